"""Names this machine in a line, for a report that is read elsewhere."""

import platform

from edgeroute.runtime import machine
from edgeroute.runtime.units import format_bytes


def this_machine() -> str:
    """System, processor, cores and memory; nothing that tells whose it is."""
    cores, memory = machine.usable_cores(), machine.memory().total_bytes
    return (
        f"{platform.system()} {platform.machine()}, {cores} core{'' if cores == 1 else 's'}, "
        f"{format_bytes(memory)}"
    )
