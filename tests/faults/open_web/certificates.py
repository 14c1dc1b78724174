"""Certificates for the TLS faults, made when the server starts."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

KINDS = ("valid", "wrong_name", "expired", "not_yet_valid", "self_signed", "unknown_authority", "no_cipher", "mutual")
"""Certificates, and two ways in which a handshake with a valid one fails: no encryption, and none from the client."""
_DAY = datetime.timedelta(days=1)


class _Authority:
    """A certificate authority, which signs keys of servers."""

    def __init__(self, name: str) -> None:
        self._key, self.name = ec.generate_private_key(ec.SECP256R1()), _name(name)
        self._key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self.certificate = (
            _builder(self.name, self._key, datetime.datetime.now(datetime.UTC))
            .issuer_name(self.name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def sign(
        self, key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName], issued: datetime.datetime
    ) -> x509.Certificate:
        return (
            _builder(_name("server"), key, issued)
            .issuer_name(self.name)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def make_contexts(directory: Path, addresses: Sequence[str]) -> tuple[Path, dict[str, ssl.SSLContext]]:
    """Make a TLS context of each kind.

    Args:
        directory: Where to write certificates and keys.
        addresses: The addresses for which the valid ones are valid.

    Returns:
        The file with the certificate of the authority to be trusted, and the contexts by kind.
    """
    now, trusted, stranger = datetime.datetime.now(datetime.UTC), _Authority("trusted"), _Authority("stranger")
    ours: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    contexts = {}
    for kind in KINDS:
        names = [x509.DNSName("elsewhere.example")] if kind == "wrong_name" else ours
        issued = now + {"expired": -30, "not_yet_valid": 30}.get(kind, 0) * _DAY
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (stranger if kind == "unknown_authority" else trusted).sign(key, names, issued)
        if kind == "self_signed":
            subject = _builder(_name("server"), key, now).issuer_name(_name("server"))
            certificate = subject.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
                key, hashes.SHA256()
            )
        contexts[kind] = _context(kind, directory / f"{kind}.pem", certificate, key)
    authority = directory / "authority.pem"
    authority.write_bytes(trusted.certificate.public_bytes(serialization.Encoding.PEM))
    contexts["mutual"].load_verify_locations(authority)
    return authority, contexts


def _context(kind: str, path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    if kind == "no_cipher":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("NULL:@SECLEVEL=0")  # authenticated, but not encrypted
    if kind == "mutual":
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, issued: datetime.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(issued - _DAY)
        .not_valid_after(issued + _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
