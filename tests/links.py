"""Whether this machine can make the slow links of scripts/lib/netns.py, found out without it."""

from __future__ import annotations

import functools
import subprocess

# What netns.py needs: namespaces, veth pairs, and the tbf queue; gone when the shell ends.
_PROBE = """
ip link add veth type veth peer other &&
tc qdisc add dev veth root tbf rate 1gbit burst 256kb limit 32mb &&
nsenter --net=/proc/self/ns/net true
"""


@functools.cache
def links_possible() -> bool:
    """True with root's rights, iproute2, util-linux and the kernel's modules."""
    probe = ["unshare", "--net", "sh", "-c", _PROBE]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False
