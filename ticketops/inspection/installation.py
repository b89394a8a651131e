"""What is installed here, and which backend of each op it comes to."""

from dataclasses import dataclass
from typing import Any

from ticketops.ops import backends, cuda_extension, extension, products
from ticketops.searching import environment


@dataclass(frozen=True)
class Installation:
    """What an installation consists of.

    Attributes:
        versions: version of each package that matters, by name.
        machine: processor, GPU and threads.
        built: state of each extension, and the library that multiplies float32 matrices on the CPU.
        backends: rows of `ticketops.ops.backends.explain`.
    """

    versions: dict[str, Any]
    machine: dict[str, Any]
    built: dict[str, str]
    backends: list[dict[str, str]]


def installation() -> Installation:
    """Looks at what is installed here.

    Raises:
        UnsupportedError: a variable of the environment, such as TICKETOPS_BACKEND, has a value that means nothing here.
    """
    built = {
        "native_kernels": extension.status,
        "cuda_kernels": cuda_extension.status,
        "float32_products": products.explain(),
    }
    return Installation(environment.versions(), environment.machine(), built, backends.explain())
