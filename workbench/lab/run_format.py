"""The format of a run folder, checked: its manifest and the header of its array file.

A run folder holds `manifest.json` and `arrays.safetensors` (format 1, docs/architecture.md section 4). Everything
here treats a folder as untrusted text: sizes are bounded before anything is read, every field is checked for its type,
and the array table of the manifest must agree with the header of the array file. The array header is the one of the
safetensors format (an unsigned 64-bit little-endian length, then that many bytes of JSON, then the data), read here
without loading the data so that arrays can be mapped instead of copied.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
RUN_ID = re.compile(r"[a-z0-9-]{1,64}")
KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
ARRAY_NAME = re.compile(r"[!-~]{1,200}")
FIGURE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}\.(png|svg|json|csv|md|txt)")
MANIFEST_LIMIT = 64 * 2**20
HEADER_LIMIT = 64 * 2**20
ENCODER_PREFIX = "encoder."  # of the names of an encoder's hook points, and of its arrays in a run
OVERVIEW_SIZE = 96

PROVENANCES = ("trained", "random", "pretrained")
FORMS = ("softmax", "gated_linear", "delta", "dense")
MODEL_FIELDS = (
    "name", "architecture", "family", "paper", "parameters", "config", "blocks", "weights_sha256", "provenance",
    "merged_from",
)  # fmt: skip
# What a writer may set; the other fields (id, created, arrays, ...) are the writer's own.
SETTABLE: dict[str, Any] = {
    "title": "", "model": None, "text": None, "tokens": None, "source": None, "interventions": [], "settings": {}, "results": {},
    "encoder": None, "seed": None, "code_version": None, "machine": None, "seconds": None, "layers": [], "hook_points": [],
    "quantities": [],
}  # fmt: skip

STORED_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


class RunError(ValueError):
    """A run cannot be written, found or read; the message says which part and what was expected."""


class RunNotFoundError(RunError, LookupError):
    """No run, array, figure or layer of that name."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest of `known`, or lists a few of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
    if not names:
        return " There are none."
    return f" Known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}."


@dataclass(frozen=True)
class StoredArray:
    """Where one array lies in the array file: dtype, shape, and its byte range from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_array_header(path: Path) -> dict[str, StoredArray]:
    """The table of arrays of a safetensors file.

    Raises RunError when the file is not a complete safetensors file: the header must parse, every array must have a
    known dtype and fill its byte range exactly, and the ranges must cover the file without gap or overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > HEADER_LIMIT or 8 + length > size:
            raise RunError(f"{path.name} is not a complete safetensors file ({size} bytes)")
        table = parse_json(file.read(length), path.name)
    arrays: dict[str, StoredArray] = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        try:
            dtype = np.dtype(STORED_DTYPES[entry["dtype"]]).newbyteorder("<")
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{path.name}: the header entry of array {name!r} is malformed or has an unknown dtype"
            ) from error
        if not whole or end - begin != math.prod(shape) * dtype.itemsize:
            raise RunError(f"{path.name}: array {name!r} of shape {shape} does not fill its byte range")
        arrays[name] = StoredArray(dtype, shape, 8 + length + begin, 8 + length + end)
    position = 8 + length
    for name, stored in sorted(arrays.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != position:
            raise RunError(f"{path.name}: array {name!r} starts at byte {stored.start}, expected {position}")
        position = stored.stop
    if position != size:
        raise RunError(
            f"{path.name} has {size} bytes, its header describes {position}: the file is cut off or has a tail"
        )
    return arrays


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a run folder's `manifest.json`; raises RunError naming the field that is wrong."""
    size = path.stat().st_size
    if size > MANIFEST_LIMIT:
        raise RunError(f"{path.name} has {size} bytes, more than the limit of {MANIFEST_LIMIT}")
    manifest = parse_json(path.read_bytes(), path.name)
    check_manifest(manifest)
    return manifest


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} does not hold valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Manifest as JSON bytes. numpy numbers and arrays, tuples and paths become plain JSON; anything else, and numbers
    that JSON has no word for (nan, infinity), is a RunError naming the field."""
    for field, value in manifest.items():
        try:
            json.dumps(value, allow_nan=False, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise RunError(f"manifest field {field!r} cannot be written as JSON: {error}") from error
    text = json.dumps(manifest, allow_nan=False, default=_plain, ensure_ascii=True, indent=1).encode()
    if len(text) > MANIFEST_LIMIT:
        raise RunError(
            f"the manifest has {len(text)} bytes, more than the limit of {MANIFEST_LIMIT}; store data as arrays"
        )
    return text


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


# ---------------------------------------------------------------------------------------------------------------------
# Fields
# ---------------------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RunError(message)


def _is(value: object, *types: type) -> bool:
    return isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise RunError unless every field of the manifest has its type and the fields agree with one another."""
    missing = [name for name in ("format", "id", "kind", "title", "created", "model", "arrays", "arrays_sha256")
               if name not in manifest]  # fmt: skip
    _require(not missing, f"manifest lacks the field(s) {', '.join(missing)}")
    version = manifest["format"]
    _require(version == FORMAT, f"manifest has format {version!r}; this program reads format {FORMAT}")
    run_id, kind = manifest["id"], manifest["kind"]
    _require(
        isinstance(run_id, str) and bool(RUN_ID.fullmatch(run_id)), f"manifest id {run_id!r} is not [a-z0-9-]{{1,64}}"
    )
    _require(isinstance(kind, str) and bool(KIND.fullmatch(kind)),
             f"kind {kind!r} is not a word of lower-case letters, digits, - and _ (at most 32)")  # fmt: skip
    _require(isinstance(manifest["title"], str), "title is not a text")
    try:
        moment = datetime.fromisoformat(manifest["created"])
    except (TypeError, ValueError) as error:
        raise RunError(f"created {manifest['created']!r} is not an ISO 8601 time") from error
    _require(moment.tzinfo is not None, f"created {manifest['created']!r} has no time zone, expected UTC")
    digest = manifest["arrays_sha256"]
    _require(isinstance(digest, str) and bool(re.fullmatch(r"[0-9a-f]{64}", digest)), "arrays_sha256 is not a SHA-256")
    _require(manifest.get("text") is None or isinstance(manifest["text"], str), "text is not a text")
    for field, expected in (("interventions", list), ("settings", dict), ("results", dict), ("layers", list),
                            ("hook_points", list), ("quantities", list), ("figures", dict)):  # fmt: skip
        _require(isinstance(manifest.get(field, expected()), expected), f"{field} is not a {expected.__name__}")
    _check_model(manifest["model"], required=kind == "trace")
    _check_tokens(manifest.get("tokens"), "tokens", required=kind == "trace")
    _check_tokens(manifest.get("source"), "source", required=False)
    _check_array_table(manifest["arrays"])
    for name, figure in manifest.get("figures", {}).items():
        described = isinstance(figure, dict) and isinstance(figure.get("sha256"), str)
        _require(described and bool(FIGURE_NAME.fullmatch(name)), f"figure {name!r} is not a file name with its sha256")
    for point in manifest.get("hook_points", []):
        _require(
            isinstance(point, dict) and {"name", "role", "axes"} <= point.keys(),
            "a hook point lacks name, role or axes",
        )
    for quantity in manifest.get("quantities", []):
        _check_quantity(quantity, manifest["arrays"])
    numbers = [check_layer(layer) for layer in manifest.get("layers", [])]
    _require(numbers == sorted(set(numbers)), f"layers are numbered {numbers}, expected increasing numbers")
    told = len((manifest.get("source") or {}).get("strings", ()))
    for layer in manifest.get("layers", []):
        columns = layer.get("n_columns")
        _require(
            columns in (None, told),
            f"layer {layer['layer']} has {columns} columns, expected the source's {told} tokens",
        )
    if kind == "trace":
        check_trace(manifest)
    if manifest.get("encoder") is not None:
        check_manifest(encoder_manifest(manifest))


def encoder_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a run stores of an encoder, as the manifest of a trace of the source. RunError for a run that stores nothing of one."""
    encoder, arrays = manifest.get("encoder"), manifest["arrays"]
    if encoder is None:
        raise RunNotFoundError(f"run {manifest['id']} stores no patterns of an encoder")
    _require(
        isinstance(encoder, dict) and isinstance(encoder.get("layers"), list),
        "encoder is not an object with a list of layers",
    )
    _require(manifest.get("source") is not None, "encoder is given without the source that it reads")
    own = {
        name.removeprefix(ENCODER_PREFIX): entry for name, entry in arrays.items() if name.startswith(ENCODER_PREFIX)
    }
    return {
        **manifest, "tokens": manifest["source"], "text": manifest["source"].get("text"), "layers": encoder["layers"], "arrays": own,
        "source": None, "encoder": None, "quantities": [],
    }  # fmt: skip


def _check_model(model: object, required: bool) -> None:
    if model is None and not required:
        return
    if not isinstance(model, dict):
        raise RunError(f"model is {type(model).__name__}, expected an object with {', '.join(MODEL_FIELDS)}")
    for field in model:
        _require(field in MODEL_FIELDS, f"model has no field {field!r}.{did_you_mean(str(field), MODEL_FIELDS)}")
    _require(isinstance(model.get("name"), str) and bool(model["name"]), "model.name is missing")
    provenance = model.get("provenance")
    _require(provenance in PROVENANCES, f"model.provenance is {provenance!r}, expected one of {', '.join(PROVENANCES)}")


def _check_tokens(tokens: object, field: str, required: bool) -> None:
    if tokens is None and not required:
        return
    if not isinstance(tokens, dict):
        raise RunError(f"{field} is missing, expected {{ids, strings, tokenizer}}")
    ids, strings = tokens.get("ids"), tokens.get("strings")
    _require(
        isinstance(ids, list) and all(_is(token, int) for token in ids), f"{field}.ids is not a list of whole numbers"
    )
    _require(
        isinstance(strings, list) and all(isinstance(text, str) for text in strings),
        f"{field}.strings is not a list of texts",
    )
    assert isinstance(ids, list) and isinstance(strings, list)
    _require(len(ids) == len(strings), f"{field} has {len(ids)} ids but {len(strings)} strings")
    named = tokens.get("predicted", {})
    _require(
        isinstance(named, dict) and all(isinstance(text, str) for text in named.values()),
        f"{field}.predicted is not an object of texts by token id",
    )


def _check_array_table(arrays: object) -> None:
    if not isinstance(arrays, dict):
        raise RunError("arrays is not an object of {name: {shape, dtype, axes, unit}}")
    for name, entry in arrays.items():
        good = isinstance(entry, dict) and ARRAY_NAME.fullmatch(name) and name != "__metadata__"
        good = (
            good
            and isinstance(entry.get("shape"), list)
            and all(_is(size, int) and size >= 0 for size in entry["shape"])
        )
        good = good and isinstance(entry.get("axes"), list) and all(isinstance(axis, str) for axis in entry["axes"])
        good = good and len(entry["axes"]) == len(entry["shape"]) and entry.get("dtype") in STORED_DTYPES.values()
        _require(bool(good), f"arrays[{name!r}] is not {{shape, dtype, axes, unit}} with one axis name per size")


def check_layer(layer: object) -> int:
    """The number of a layer, from its record in a manifest's `layers`; RunError unless the record is well formed.

    `form` may be null for a layer that has no pattern (a recurrence that is not linear in its values).
    """
    if not isinstance(layer, dict):
        raise RunError(f"a layer record is a {type(layer).__name__}, expected an object")
    number = layer.get("layer")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise RunError(f"a layer record has the layer number {number!r}, expected 0, 1, 2, ...")
    where = f"layer {number}:"
    _require(isinstance(layer.get("kind"), str), f"{where} kind is missing")
    form = layer.get("form")
    _require(form is None or form in FORMS, f"{where} form is {form!r}, expected one of {', '.join(FORMS)} or null")
    heads = layer.get("n_heads")
    if not _is(heads, int) or not isinstance(heads, int) or heads < 1:
        raise RunError(f"{where} n_heads is {heads!r}, expected a positive number")
    for field in ("n_key_heads", "n_value_heads"):
        groups = layer.get(field, heads)
        _require(_is(groups, int) and groups >= 1 and heads % groups == 0,
                 f"{where} {field} is {groups!r}, expected a divisor of n_heads = {heads}")  # fmt: skip
    if form in FORMS and form != "dense":
        scale = layer.get("scale")
        finite = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
        _require(finite, f"{where} scale is {scale!r}, expected a number")
    slopes, window = layer.get("alibi_slopes"), layer.get("window")
    listed = isinstance(slopes, list) and len(slopes) == heads and all(_is(slope, int, float) for slope in slopes)
    _require(slopes is None or listed, f"{where} alibi_slopes is not null and not a list of {heads} numbers")
    _require(
        window is None or (_is(window, int) and window >= 1),
        f"{where} window is {window!r}, expected null or at least 1",
    )
    columns = layer.get("n_columns")
    _require(
        columns is None or (_is(columns, int) and columns >= 1 and form == "dense"),
        f"{where} n_columns is {columns!r}, expected a positive number, of a dense layer, or null",
    )
    for field, default in (("pattern", {}), ("state", None), ("signals", [])):
        value = layer.get(field, default)
        _require(value is None or isinstance(value, type(default) if default is not None else dict),
                 f"{where} {field} has the wrong type ({type(value).__name__})")  # fmt: skip
    return number


def check_trace(manifest: dict[str, Any]) -> None:
    """Raise RunError unless a trace run holds the arrays that its layers promise, in the shapes of the run contract."""
    arrays: dict[str, dict[str, Any]] = manifest["arrays"]
    length = len(manifest["tokens"]["ids"])

    def check(name: str, *shape: int | None, required: bool = False) -> None:
        if name not in arrays:
            _require(not required, f"a trace run needs the array {name!r}.{did_you_mean(name, arrays)}")
            return
        actual = arrays[name]["shape"]
        agrees = len(actual) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, actual, strict=True)
        )
        _require(
            agrees,
            f"array {name!r} has shape {actual}, expected {[size if size is not None else 'any' for size in shape]}",
        )

    check("tokens", length, required=True)
    check("loss", length)
    check("next.log_probs", length, None)
    check("next.ids", length, None)
    check("here.log_probs", length, None)
    check("here.ids", length, None)
    check("resid_norm", None, length)
    pooled = min(length, OVERVIEW_SIZE)
    for layer in manifest["layers"]:
        index, heads, form = layer["layer"], layer["n_heads"], layer.get("form")
        prefix = f"layer.{index}."
        factors = form in FORMS and form != "dense"
        check(prefix + "query", heads, length, None, required=factors)
        check(prefix + "key", layer.get("n_key_heads", heads), length, None, required=factors)
        check(prefix + "value", layer.get("n_value_heads", heads), length, None, required=factors)
        check(prefix + "log_normaliser", heads, length, required=form == "softmax")
        columns = layer.get("n_columns") or length
        check(prefix + "pattern", heads, length, columns, required=form == "dense" and not layer.get("not_stored"))
        check(prefix + "pattern_rows", heads, None, columns)
        by_row = len(arrays.get(prefix + "log_decay", {}).get("shape", ())) == 3
        check(prefix + "log_decay", heads, length, *([None] if by_row else []))
        check(prefix + "write", heads, length, required=form == "delta")
        for name in ("x", "y"):
            check(prefix + name, heads, length, None)
        check(f"overview.{index}", heads, pooled, min(columns, OVERVIEW_SIZE))
        check(f"received.{index}", heads, columns)
        for name in ("entropy", "state_norm"):
            check(f"{name}.{index}", heads, length)
        for slot in layer.get("states") or []:
            _check_slot(slot, index, arrays)
        for signal in layer.get("signals") or []:
            named = signal.get("array") if isinstance(signal, dict) else None
            if named not in arrays:
                lacks = f"layer {index}: signals names the array {named!r}, which the run lacks."
                raise RunError(lacks + did_you_mean(str(named), arrays))


def _check_quantity(quantity: object, arrays: dict[str, dict[str, Any]]) -> None:
    """Raise RunError unless a special quantity names its hook point, role, layer and three axes, and an array that has them (or none)."""
    if not isinstance(quantity, dict) or not {"point", "role", "layer", "array", "axes"} <= quantity.keys():
        raise RunError("a quantity lacks point, role, layer, array or axes")
    name, layer, axes, array = quantity["point"], quantity["layer"], quantity["axes"], quantity["array"]
    _require(
        _is(name, str) and _is(quantity["role"], str), f"a quantity has the point {name!r}, expected a name and a role"
    )
    _require(
        layer is None or (_is(layer, int) and layer >= 0),
        f"quantity {name!r} has the layer {layer!r}, expected a number or null",
    )
    _require(
        _is(axes, list) and len(axes) == 3 and all(_is(axis, str) for axis in axes),
        f"quantity {name!r} has no three axes",
    )
    _require(array == "" or (array in arrays and arrays[array]["axes"] == axes),
             f"quantity {name!r} names the array {array!r}, expected one of these axes that the run has, or none")  # fmt: skip


def _check_slot(slot: Any, index: int, arrays: Collection[str]) -> None:
    """Raise RunError unless an entry of a layer's `states` names a state, its axes, and where it is: an array, or none (the factors)."""
    whole = (
        isinstance(slot, dict)
        and _is(slot.get("name"), str)
        and _is(slot.get("axes"), list)
        and _is(slot.get("shape"), list)
    )
    _require(whole, f"layer {index}: an entry of states lacks its name, axes or shape: {str(slot)[:80]}")
    name, array = slot["name"], slot.get("array")
    own = (f"layer.{index}.states", f"layer.{index}.states.{name}")
    _require(
        array is None or (array in own and array in arrays),
        f"layer {index}: state {name!r} names the array {array!r}, expected one of {', '.join(own)} that the run has, or none",
    )


def check_arrays_agree(table: dict[str, dict[str, Any]], stored: dict[str, StoredArray]) -> None:
    """Raise RunError unless the manifest's array table and the array file describe the same arrays."""
    for name in sorted(table.keys() ^ stored.keys()):
        raise RunError(
            f"array {name!r} is in the {'manifest but not in the array file' if name in table else 'array file only'}"
        )
    for name, entry in table.items():
        found = stored[name]
        if list(found.shape) != entry["shape"] or found.dtype.name != entry["dtype"]:
            raise RunError(f"array {name!r} is {found.dtype.name} {list(found.shape)} in the array file, "
                           f"{entry['dtype']} {entry['shape']} in the manifest")  # fmt: skip


def check_names(names: Collection[str], allowed: Collection[str], what: str) -> None:
    """Raise RunError naming the first of `names` that is not `allowed`, with the nearest allowed one."""
    for name in names:
        if name not in allowed:
            raise RunError(f"there is no {what} {name!r}.{did_you_mean(name, allowed)}")
