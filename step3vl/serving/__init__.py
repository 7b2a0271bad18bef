"""A generator behind OpenAI's chat protocol: requests are checked, batched, answered, and counted."""

from .backends import Backend, Coordinated, Plain, Said
from .batching import Batcher, Closing
from .protocol import Limits, Refused, read_request
from .server import ChatServer
from .weights import Weights

__all__ = [
    "Backend",
    "Batcher",
    "ChatServer",
    "Closing",
    "Coordinated",
    "Limits",
    "Plain",
    "Refused",
    "Said",
    "Weights",
    "read_request",
]
