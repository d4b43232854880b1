"""The page's look, light and dark, and the one small script that reads values under the pointer."""

from __future__ import annotations

import base64
import hashlib

__all__ = ["POLICY", "SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1b1c1f; --soft: #63666d;
  --rule: #e3e3df; --main: #2563a8; --band: #2563a833; --past: #9aa3ad; --peer: #9aa3ad88;
  --critical: #c4201d; --warn: #b26a00; --ok: #1f7a3d; --action: #6a3fb0; --cause: #c4201d; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1b1d21; --ink: #e8e8e6;
  --soft: #9b9fa8; --rule: #2f3238; --main: #6fb1f5; --band: #6fb1f533; --past: #6b727c;
  --peer: #6b727c88; --critical: #ff6b63; --warn: #f0a83a; --ok: #5fc983; --action: #b596f0;
  --cause: #ff6b63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
header.top { border-left: .5rem solid var(--level); padding: .1rem 0 .1rem 1rem; }
header.top h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; color: var(--level);
  overflow-wrap: anywhere; }
header.top p { margin: .2rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
.critical { --level: var(--critical); } .warn { --level: var(--warn); } .ok { --level: var(--ok); }
.story { font-size: 1.12rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.story li { margin: .45rem 0; overflow-wrap: anywhere; }
.story li.cause { font-weight: 600; }
section { margin-top: 2rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--rule); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .75rem 1rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem;
  margin: 1rem 0 0; }
.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .45rem .75rem; min-width: 0; overflow-wrap: anywhere; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; font-weight: 600; }
.suspects { list-style: none; margin: 0; padding: 0; }
.suspects > li { margin: 0 0 .6rem; } .suspects ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.suspects.first > li { border-left: 3px solid var(--cause); padding-left: .75rem; }
.suspects .share { color: var(--soft); font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.1rem 1.5rem; }
.chart { margin: 0; break-inside: avoid; min-width: 0; }
.charts .chart:first-child { grid-column: 1 / -1; }
.chart figcaption { display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap; }
.unit, .end, .legend { color: var(--soft); font-size: .85rem; }
.end { margin-left: auto; } .end.critical { color: var(--critical); font-weight: 600; }
output { color: var(--main); font-size: .85rem; font-variant-numeric: tabular-nums; }
.frame { position: relative; padding-left: 4.2rem; font-size: .75rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.plot { position: relative; height: 11rem; background: var(--card);
  border: 1px solid var(--rule); }
.plot svg { display: block; width: 100%; height: 100%; overflow: hidden; }
.plot path { fill: none; stroke-width: 1.6px; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; stroke-linecap: round; }
.plot path.line.main { stroke: var(--main); } .plot path.band { stroke: none; }
.plot path.band.main { fill: var(--band); }
.plot path.line.past { stroke: var(--past); stroke-dasharray: 4 3; }
.plot path.line.peer { stroke: var(--peer); stroke-width: 1px; }
.plot path.line.odd { stroke: var(--critical); stroke-width: 2px; }
.plot path.dots { stroke-width: 5px; } .plot path.dots.main { stroke: var(--main); }
.plot path.dots.odd { stroke: var(--critical); } .plot path.dots.past { stroke: var(--past); }
.plot path.dots.peer { stroke: var(--peer); }
.plot path.grid { stroke: var(--rule); stroke-width: 1px; }
.plot path.mark { stroke-width: 1px; opacity: .55; }
.plot path.mark.critical { stroke: var(--critical); }
.plot path.mark.action { stroke: var(--action); stroke-dasharray: 2 3; }
.plot path.mark.cause { stroke: var(--cause); stroke-width: 2px; opacity: 1; }
.plot rect.lost { fill: var(--critical); }
.cursor { display: none; position: absolute; top: 0; bottom: 0; width: 1px;
  background: var(--main); pointer-events: none; }
.values { position: absolute; left: 0; top: 0; width: 3.9rem; height: 11rem; text-align: right; }
.values span { position: absolute; right: 0; transform: translateY(50%); white-space: nowrap; }
.began { position: absolute; left: 0; right: 0; top: -.1rem; height: 1.2rem; }
.began span { font-size: 1.05rem; line-height: 1; color: var(--cause); cursor: help;
  text-shadow: 0 0 2px var(--card), 0 0 2px var(--card); }
.steps, .lane { position: relative; height: 1.1rem; } .lane:empty { display: none; }
.steps span, .lane span, .began span { position: absolute; transform: translateX(-50%);
  white-space: nowrap; }
.lane span { font-size: .8rem; cursor: help; line-height: 1.2rem; }
.lane .critical, .glyph.critical { color: var(--critical); }
.lane .warn, .glyph.warn { color: var(--warn); } .lane .ok, .glyph.ok { color: var(--ok); }
.lane .action, .glyph.action { color: var(--action); }
.glyph.cause { color: var(--cause); font-size: 1.05rem; }
.legend { margin: 0 0 .6rem; } .key { margin-right: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.2rem; height: 0; margin-right: .35rem;
  vertical-align: middle; border-top: 2px solid var(--main); }
.key.past::before { border-top: 2px dashed var(--past); }
.key.odd::before { border-color: var(--critical); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
td.when { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.text { min-width: 14rem; overflow-wrap: anywhere; }
tr.odd td { color: var(--critical); font-weight: 600; }
summary { cursor: pointer; color: var(--soft); } details .suspects { margin-top: .6rem; }
.soft { color: var(--soft); }
.bar { display: inline-block; width: 8rem; max-width: 40vw; height: .6rem; border-radius: .3rem;
  background: var(--rule); overflow: hidden; vertical-align: middle; }
.bar i { display: block; height: 100%; background: var(--main); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
footer { margin-top: 2rem; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { font-size: 15px; } header.top h1 { font-size: 1.5rem; }
  .frame { padding-left: 3.2rem; } .values { width: 3rem; } .plot, .values { height: 9rem; }
  .steps span:nth-child(even) { display: none; } td, th { padding: .25rem .4rem; }
  td.when { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.text { min-width: 11rem; } }
@media print { body { background: #fff; } section { break-inside: auto; } output { display: none; }
  .lane span { print-color-adjust: exact; } pre { white-space: pre-wrap; } }
"""

SCRIPT = """
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const first = Number(plot.dataset.first), last = Number(plot.dataset.last);
  const curves = JSON.parse(plot.dataset.curves);
  const cursor = plot.querySelector(".cursor");
  const output = plot.closest("figure").querySelector("output");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const step = first + share * (last - first);
    const parts = [];
    let shown = step;
    for (const [name, points] of curves) {
      let low = 0, high = points.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (points[middle][0] < step) low = middle + 1; else high = middle;
      }
      if (low > 0 && step - points[low - 1][0] < points[low][0] - step) low -= 1;
      if (points.length) { parts.push(name + " " + points[low][1]); shown = points[low][0]; }
    }
    output.textContent = "step " + Math.round(shown).toLocaleString("en-US") + ": " +
      parts.join(", ");
    cursor.style.display = "block";
    cursor.style.left = 100 * share + "%";
  });
  plot.addEventListener("pointerleave", () => {
    cursor.style.display = "none";
    output.textContent = "";
  });
}
"""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{_digest(SCRIPT)}'"
)
"""What a browser may do with the page: nothing from anywhere, and of scripts only ours."""
