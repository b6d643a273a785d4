"""Decides what a pod is given to use the object stores of clouds: where they are, and the identity it has there; pure.

Only prepare and publish have an identity, and only one that the profile names: no job can choose a ServiceAccount.
"""

from qlora_api import contract
from qlora_api.naming import CLOUD_IDENTITY_LABEL
from qlora_api.profile import Profile
from qlora_api.status import StepName

_WITH_IDENTITY = ("prepare", "publish")
# By which Azure's webhook recognizes the pods to which it adds a token. Those of the other clouds look at the account.
_OF_PROVIDER = {"azure": {"azure.workload.identity/use": "true"}}


def cloud_environment(profile: Profile) -> dict[str, str | None]:
    """Environment variables for a step that uses object stores: their addresses, and whether there is an identity."""
    google, azure, identity = profile.google_storage, profile.azure_storage, profile.cloud_identity
    return {
        "GOOGLE_BASE_URL": google.endpoint if google else None,
        "AZURE_STORAGE_ACCOUNT_NAME": azure.account if azure else None,
        "AZURE_STORAGE_ENDPOINT": azure.endpoint if azure else None,
        contract.ENV_CLOUD_IDENTITY: identity.provider if identity else None,
    }


def service_account_name(profile: Profile, step: StepName) -> str | None:
    """The ServiceAccount of a step's pod; None: the namespace's default."""
    if profile.cloud_identity is not None and step in _WITH_IDENTITY:
        return profile.cloud_identity.service_account_name
    return profile.service_account_name


def identity_labels(profile: Profile, step: StepName) -> dict[str, str]:
    """Labels of a pod with an identity, for NetworkPolicies and for the cloud's webhook."""
    identity = profile.cloud_identity
    if identity is None or step not in _WITH_IDENTITY:
        return {}
    return {CLOUD_IDENTITY_LABEL: identity.provider} | _OF_PROVIDER.get(identity.provider, {})
