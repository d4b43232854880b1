"""How a Kafka client reaches its brokers: addresses, TLS and SASL, the same for every client."""

from __future__ import annotations

import ssl
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

__all__ = ["MECHANISMS", "PROTOCOLS", "Connection", "connect_to"]

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

RECONNECT_MAX_MS = 1000  # kafka-python waits up to 30 s by default after an outage


class Connection(NamedTuple):
    """Where the brokers are, and as whom one speaks to them."""

    brokers: Tuple[str, ...]  # host:port
    protocol: str = "PLAINTEXT"
    mechanism: str = "PLAIN"
    username: str = ""
    password: str = ""
    ca_file: str = (
        ""  # PEM of the authority that signed the brokers' certificates; "": the system's
    )
    certificate_file: str = ""  # of this client, PEM, for mutual TLS
    key_file: str = ""

    @property
    def uses_sasl(self) -> bool:
        """Whether it authenticates by name and secret."""
        return self.protocol.startswith("SASL_")

    def ssl_context(self) -> Optional[ssl.SSLContext]:
        """The TLS settings; None: no TLS. OSError: a file is missing or no certificate."""
        if not self.protocol.endswith("SSL"):
            return None
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file or None)
        return context

    def client_options(self) -> Dict[str, Any]:
        """Keyword arguments for any client of kafka-python or aiokafka."""
        options: Dict[str, Any] = {
            "bootstrap_servers": list(self.brokers),
            "security_protocol": self.protocol,
        }
        context = self.ssl_context()
        if context is not None:
            options["ssl_context"] = context
        if self.uses_sasl:
            options["sasl_mechanism"] = self.mechanism
            options["sasl_plain_username"] = self.username
            options["sasl_plain_password"] = self.password
        return options


def connect_to(
    brokers: Union[str, Sequence[str]],
    *,
    api_key: str = "",
    protocol: str = "",
    mechanism: str = "",
    ca_file: str = "",
    certificate_file: str = "",
    key_file: str = "",
) -> Connection:
    """A connection from its settings.

    Args:
        brokers: ``host:port``, several separated by commas or in a list; ``kafka://`` may stand
            before it.
        api_key: ``id:secret``, the SASL name and password; "" for none.
        protocol: one of :data:`PROTOCOLS`; "" is SASL_SSL with an api_key, SSL with a CA file, else
            PLAINTEXT.
        mechanism: one of :data:`MECHANISMS`; "" is PLAIN.

    Raises:
        ValueError: one of them cannot be; the message says what it must be.

    >>> connect_to("kafka://a:9092,b:9092").brokers
    ('a:9092', 'b:9092')
    """
    listed = brokers.split(",") if isinstance(brokers, str) else list(brokers)
    addresses = tuple(_address(text) for text in listed if text.strip())
    if not addresses:
        raise ValueError("brokers must be host:port, several separated by commas")
    name, colon, secret = api_key.partition(":")
    if api_key and not (name and colon and secret):
        raise ValueError("api_key must be 'id:secret' for Kafka: the SASL name and password")
    if not protocol:
        protocol = "SASL_SSL" if api_key else ("SSL" if ca_file else "PLAINTEXT")
    protocol, mechanism = protocol.upper(), (mechanism or "PLAIN").upper()
    if protocol not in PROTOCOLS:
        raise ValueError(f"the security protocol is one of {', '.join(PROTOCOLS)}; not {protocol}")
    if mechanism not in MECHANISMS:
        raise ValueError(f"the SASL mechanism is one of {', '.join(MECHANISMS)}; not {mechanism}")
    if protocol.startswith("SASL_") and not api_key:
        raise ValueError(f"{protocol} needs an api_key 'id:secret'")
    return Connection(
        addresses, protocol, mechanism, name, secret, ca_file, certificate_file, key_file
    )


def _address(text: str) -> str:
    address = text.strip()
    if address.startswith("kafka://"):
        address = address[len("kafka://") :]
    host, colon, port = address.rstrip("/").rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"a broker is host:port, not {text.strip()!r}")
    return f"{host}:{port}"
