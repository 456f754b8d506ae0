"""`edgeroute doctor --prove`: devices against the processor on one model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgeroute.commands.doctor_table import Row
from edgeroute.config import merge_settings
from edgeroute.device_choice import candidates, prove
from edgeroute.models.pull import resolve
from edgeroute.runtime.device import RPC_PREFIX
from edgeroute.runtime.errors import CapacityError, ComputeError, LibraryError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.rpc_link import parse_address


def prove_devices(
    model: str, rpc: Sequence[str], settings: Mapping[str, object]
) -> list[dict[str, Any]]:
    """Compare every GPU here, and the device behind each address, with the processor.

    Returns:
        One record per device: `device`, and the fields of DeviceProof with `gain`; or `error`
        where it could not be tried.

    Raises:
        UsageError: what was given is no address.
        CatalogueError, ModelFileError: the model is not here, or cannot be used.
    """
    names = [info.name for info in candidates()]
    names += [RPC_PREFIX + "{}:{}".format(*parse_address(each)) for each in rpc]
    params = merge_settings(settings)
    found = []
    with GGUFFile.open(resolve(model)) as file:
        for name in names:
            try:
                proof = prove(name, file, params)
            except (CapacityError, ComputeError, LibraryError) as error:
                found.append({"device": name, "error": str(error)})
            else:
                found.append({"device": name} | asdict(proof) | {"gain": round(proof.gain, 4)})
    return found


def proof_rows(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Show what came out, a device per row or two."""
    if not found:
        return [("none", "ggml lists no GPU here; name devices of other machines by --rpc")]
    rows: list[Row] = []
    for each in found:
        if "error" in each:
            rows.append((each["device"], f"could not be tried: {each['error']}"))
            continue
        verdict = "answers like the processor" if each["holds"] else f"FAILED: {each['note']}"
        rows.append((each["device"], verdict))
        if each["n_tokens"]:
            rows.append(("", f"{each['n_tokens']} tokens through {each['n_layers']} layers: error "
                         f"{each['nmse']:.2g} of the power, {each['worst_nmse']:.2g} at worst, "
                         f"{each['n_changed']} clear tokens changed"))  # fmt: skip
            rows.append(("", f"{each['gain']:.2f} times the processor's speed for a usual answer "
                         f"(a token {1e3 * each['decode_s']:.2f} ms against "
                         f"{1e3 * each['cpu_decode_s']:.2f} ms)"))  # fmt: skip
    return rows
