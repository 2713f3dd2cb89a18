"""A process that writes notifications into the FUSE device; see `cachefs.notifier`, which starts it.

Run as a plain script (`python -I -S notify_worker.py`): it imports nothing of the package, so that it starts in
about 10 ms. Descriptor 0 is a SEQPACKET socket with one notification per packet, descriptor 3 the device. Each is
answered with 4 bytes: 0, or the errno of the write. It ends when the socket does.
"""

import os


def main() -> None:
    """Until the server is gone: its end shows as an empty read, or as an error when an answer was not read yet."""
    while message := _next_message():
        number = 0
        try:
            os.write(3, message)
        except OSError as exc:
            number = exc.args[0]
        try:
            os.write(0, number.to_bytes(4, "little"))
        except OSError:
            return


def _next_message() -> bytes:
    try:
        return os.read(0, 4096)
    except ConnectionError:
        return b""


if __name__ == "__main__":
    main()
