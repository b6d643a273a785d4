"""Checks the addresses of servers in environment variables."""

from collections.abc import Mapping
from ipaddress import ip_address
from socket import inet_aton
from urllib.parse import urlsplit

from qlora_trainer.core.failures import bad_configuration

# Besides link-local addresses such as 169.254.169.254, where clouds hand out the credentials of the node.
_METADATA = frozenset(
    map(ip_address, ("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "168.63.129.16"))
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal"})


def server_address(environment: Mapping[str, str], variable: str) -> str | None:
    """The address in the variable, or None if it is not set.

    Raises StepFailure BAD_CONFIGURATION unless it is http:// or https:// with a host, without credentials, since the
    profile that sets it is not a secret, and not a cloud's metadata service, which would receive the job's credentials
    and hand out the node's.
    """
    address = environment.get(variable)
    if not address:
        return None
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _wrong(variable, "is not an address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise _wrong(variable, f"begins with {address.partition(':')[0][:20]!r} or has no host")
    if parts.username is not None or parts.password is not None:
        raise _wrong(variable, "has credentials in it, which every tenant can read in the profile")
    if _is_metadata(host):
        raise _wrong(variable, f"is {host}, the metadata service of a cloud")
    return address


def _is_metadata(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        try:
            # Other spellings of an IPv4 address, such as 0xa9fea9fe, which the resolver takes too.
            address = ip_address(inet_aton(host))
        except OSError:
            return host.lower().rstrip(".") in _METADATA_NAMES
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_link_local or address in _METADATA


def _wrong(variable: str, what: str) -> Exception:
    return bad_configuration(
        f"the address of a server in {variable} {what}: it must be http:// or https:// with the server's host; ask the "
        "administrator to correct the profile"
    )
