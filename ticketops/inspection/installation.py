"""Description of an installation: versions, machine, extensions, and the backend that runs each op."""

from dataclasses import dataclass
from typing import Any

from ticketops.ops import backends, cuda_extension, extension, products
from ticketops.searching import environment


@dataclass(frozen=True)
class Installation:
    """Description of an installation, for `ticketops doctor`.

    Attributes:
        versions: versions of the relevant packages, by name.
        machine: processor, GPU and number of threads.
        built: state of each extension, and the library for float32 matrix products on the CPU.
        backends: rows from `ticketops.ops.backends.explain`.
    """

    versions: dict[str, Any]
    machine: dict[str, Any]
    built: dict[str, str]
    backends: list[dict[str, str]]


def installation() -> Installation:
    """Describes the current installation.

    Raises:
        UnsupportedError: an environment variable of ticketops, such as TICKETOPS_BACKEND, has an invalid value.
    """
    built = {
        "native_kernels": extension.status,
        "cuda_kernels": cuda_extension.status,
        "float32_products": products.explain(),
    }
    return Installation(environment.versions(), environment.machine(), built, backends.explain())
