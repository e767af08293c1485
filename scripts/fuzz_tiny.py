"""Random bodies for a server of a tiny random model, which it starts and ends: `make fuzz`.

Leaves with 1 where a body fails, and where the server does not end well or has put a traceback into its output.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from fuzz_serve import fuzz_for
from helpers.server import serving, write_served_model

SETTINGS = ("policies=[threshold,entropy,margin,patience,fixed]", "audit=0.5", "follow=0.9", "max_new_tokens=16")


def main() -> int:
    """Until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_served_model(folder)
        with serving(model, folder, "name=tiny", *SETTINGS) as server:
            try:
                bodies = fuzz_for(server.url, "tiny", seconds)
                os.kill(server.process.pid, signal.SIGTERM)
                server.process.join()
            finally:
                sys.stderr.write(server.output)
            if server.process.exitcode or "Traceback" in server.output:
                sys.stderr.write(f"the server left with {server.process.exitcode}\n")
                return 1
    sys.stdout.write(f"{bodies} bodies, each answered or refused\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
