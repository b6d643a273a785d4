"""Finds the identity that a cloud has given the pod through its ServiceAccount, where the profile allows it to be used.

A webhook of the cloud puts a token and the names of its files into pods whose ServiceAccount the administrator has
connected with a role. Nothing here is used unless the operator has named the cloud: a node has credentials too, which
are not the tenant's.
"""

from collections.abc import Mapping

from qlora_api import contract
from qlora_trainer.core.failures import StepFailure, unreachable
from qlora_trainer.stores.bucket import Access

_AZURE_LOGIN = "https://login.microsoftonline.com"
_GOOGLE_METADATA = ("metadata.google.internal", "169.254.169.254")


def aws_identity(environment: Mapping[str, str], region: str) -> Access | None:
    """The role of IRSA or of EKS Pod Identity, or None if the profile allows none of AWS.

    Raises StepFailure UNREACHABLE if neither webhook has reached the pod.
    """
    if environment.get(contract.ENV_CLOUD_IDENTITY) != "aws":
        return None
    if token := environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        sts = environment.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{region}.amazonaws.com"
        role = _require(environment, "AWS_ROLE_ARN")
        session = environment.get("AWS_ROLE_SESSION_NAME") or "qlora"
        config = {
            "web_identity_token_file": token,
            "role_arn": role,
            "role_session_name": session,
            "aws_endpoint_url_sts": sts,
        }
        return Access(config, (sts,), by_identity=True)
    agent = _require(environment, "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    file = _require(environment, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    config = {"container_credentials_full_uri": agent, "container_authorization_token_file": file}
    return Access(config, (agent,), by_identity=True)


def google_identity(environment: Mapping[str, str]) -> Access | None:
    """The service account of GKE's workload identity, by its metadata server.

    None if the profile does not allow it.
    """
    if environment.get(contract.ENV_CLOUD_IDENTITY) != "google":
        return None
    own = environment.get("GCE_METADATA_HOST")
    return Access({}, tuple(f"http://{host}" for host in ((own,) if own else _GOOGLE_METADATA)), by_identity=True)


def azure_identity(environment: Mapping[str, str]) -> Access | None:
    """The application of Azure's workload identity, or None if the profile does not allow it.

    Raises StepFailure UNREACHABLE if its webhook has not reached the pod.
    """
    if environment.get(contract.ENV_CLOUD_IDENTITY) != "azure":
        return None
    login = environment.get("AZURE_AUTHORITY_HOST") or _AZURE_LOGIN
    config = {
        "credential_type": "workload_identity",
        "client_id": _require(environment, "AZURE_CLIENT_ID"),
        "tenant_id": _require(environment, "AZURE_TENANT_ID"),
        "federated_token_file": _require(environment, "AZURE_FEDERATED_TOKEN_FILE"),
        "authority_host": login.rstrip("/"),
    }
    return Access(config, (login,), by_identity=True)


def _require(environment: Mapping[str, str], variable: str) -> str:
    if value := environment.get(variable):
        return value
    raise _not_given(variable)


def _not_given(variable: str) -> StepFailure:
    return unreachable(
        f"the pod was given no cloud identity ({variable} is not set): ask the administrator whether the "
        "ServiceAccount of the profile's cloudIdentity is connected with a role in this namespace, and whether the "
        "cloud's webhook runs"
    )
