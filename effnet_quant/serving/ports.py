"""check_port: whether a server can have a port."""

from __future__ import annotations

import socket

from effnet_quant.errors import UserError


def check_port(port: int, flag: str) -> None:
    """Refuse a port that is in use. gRPC would silently share it, and uvicorn would end with a traceback.

    Raises:
        UserError: it is in use, forbidden or no port; ``flag`` chooses another.
    """
    if not 1 <= port < 2**16:
        raise UserError(f"{flag} must be 1 to 65535, not {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen()
        except OSError as error:
            raise UserError(f"port {port} can't be used ({error.strerror}); choose another with {flag}.") from error
