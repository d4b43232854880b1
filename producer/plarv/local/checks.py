"""The ten checks of one detector."""

from __future__ import annotations

from typing import Dict, Set

from plarv.local.activation_saturation import ActivationSaturation
from plarv.local.activation_sparsity import ActivationSparsity
from plarv.local.activations import ActivationStatistics
from plarv.local.attention_collapse import AttentionCollapse
from plarv.local.gradient_flow import GradientFlow
from plarv.local.hardware_integrity import HardwareIntegrity
from plarv.local.loss_spike import LossSpike
from plarv.local.optimizer_health import OptimizerHealth
from plarv.local.precision_erosion import PrecisionErosion
from plarv.local.report import CheckResult
from plarv.local.representation_collapse import RepresentationCollapse
from plarv.local.weight_imbalance import WeightImbalance

__all__ = ["Checks"]


class Checks:
    """All ten, with their pasts: they take numbers and know nothing of torch."""

    def __init__(self) -> None:
        self.activation_sparsity = ActivationSparsity()
        self.activation_saturation = ActivationSaturation()
        self.gradient_flow = GradientFlow()
        self.weight_imbalance = WeightImbalance()
        self.optimizer_health = OptimizerHealth()
        self.attention_collapse = AttentionCollapse()
        self.loss_spike = LossSpike()
        self.representation_collapse = RepresentationCollapse()
        self.precision_erosion = PrecisionErosion()
        self.hardware_integrity = HardwareIntegrity()

    def take_activations(self, step: int, layer: str, found: ActivationStatistics) -> None:
        """One look at a layer's activations."""
        self.activation_sparsity.take(step, layer, found.dead, found.size)
        self.activation_saturation.take(step, layer, found.clumped)
        self.representation_collapse.take(step, layer, found.variance_share)

    def suspects(self) -> Set[str]:
        """Layers whose activations should be looked at again at once."""
        checks = (
            self.activation_sparsity,
            self.activation_saturation,
            self.representation_collapse,
        )
        return {layer.partition("|")[0] for check in checks for layer in check.suspects()}

    def results(self, step: int) -> Dict[str, CheckResult]:
        """All ten results, in the order of a report."""
        return {
            "activation_sparsity": self.activation_sparsity.result(step),
            "activation_saturation": self.activation_saturation.result(step),
            "gradient_flow": self.gradient_flow.result(step),
            "weight_imbalance": self.weight_imbalance.result(step),
            "optimizer_health": self.optimizer_health.result(step),
            "attention_collapse": self.attention_collapse.result(step),
            "loss_spike": self.loss_spike.result(),
            "representation_collapse": self.representation_collapse.result(step),
            "precision_erosion": self.precision_erosion.result(step),
            "hardware_integrity": self.hardware_integrity.result(step),
        }
