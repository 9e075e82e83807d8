"""The certificate of HTTPS: a given one is checked, otherwise one is made for trying."""

import dataclasses
import ipaddress
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scripts.gateway.gateway import Options
from scripts.serve.running import HOST
from scripts.terminal import UserError

_CERTIFICATE_DAYS = 90


def check_certificate(options: Options) -> None:
    """Stops, by a `UserError`, where the given certificate and its key cannot be used."""
    if bool(options.certificate) != bool(options.certificate_key):
        raise UserError("CERTIFICATE and CERTIFICATE_KEY belong together; give both, or neither.")
    if not options.certificate:
        return
    for file in (options.certificate, options.certificate_key):
        if not Path(file).is_file():
            raise UserError(f"{file} is not a file.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            options.certificate, options.certificate_key, password=""
        )
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"{options.certificate} and {options.certificate_key} are no certificate and its "
            f"private key, both PEM and the key without a password: {error}"
        ) from error


def with_certificate(options: Options, folder: Path) -> Options:
    """Fills in a self-signed certificate where the options name none."""
    if options.certificate:
        return dataclasses.replace(
            options,
            certificate=str(Path(options.certificate).resolve()),
            certificate_key=str(Path(options.certificate_key).resolve()),
        )
    certificate, key = folder.resolve() / "certificate.pem", folder.resolve() / "certificate.key"
    _self_signed(certificate, key)
    return dataclasses.replace(options, certificate=str(certificate), certificate_key=str(key))


def _self_signed(certificate: Path, key: Path) -> None:
    """Makes a certificate that is good for trying: no client trusts it unless told to."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.touch(mode=0o600)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
