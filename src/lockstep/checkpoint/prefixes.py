"""Weights that others have saved, under the model's names: what stands before each name is found, and taken away.

    conv1.weight                       a plain state_dict
    module.conv1.weight                DistributedDataParallel's, torch.nn.DataParallel's, AveragedModel's
    _orig_mod.conv1.weight             torch.compile's; FSDP's and checkpoint's wrappers stand between two parts of a name
    state_dict: {model.conv1.weight}   a LightningModule's, under the name that the model has in it
    module: {conv1.weight}             DeepSpeed's mp_rank_00_model_states.pt
    model: {…}, model_ema: {…}         a training script's checkpoint; two that fit are for the user to choose from

Nested dicts count as parts of a name, so one prefix says all: `state_dict.model.`, `model_ema.`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.models.parameters import NO_HEAD
from lockstep.utils.text import count

SAME_MODEL = "set model=…, model.norm=…, or the keys of your task, to the model that was saved"
# Of torch.compile, FSDP and activation checkpointing: no module of a model's own is called so.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fpw_module.", "_forward_module.")
COUNTER = "num_batches_tracked"  # of BatchNorm, and only since PyTorch 0.4.1


@dataclass
class Fit:
    """Weights under the model's own names.

    Attributes:
        sources: {the model's name: the name in the file}; what is not there begins at 0.
        notes: what was stripped, left out and not there, each in a few words.
    """

    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def said(self) -> str:
        """The notes as the end of a line."""
        return "".join(f"; {note}" for note in self.notes)


def check_shape(path: Path, name: str, there: tuple[int, ...] | None, here: tuple[int, ...]) -> None:
    """Refuse a tensor that is missing or has another shape; raises UserError."""
    if there is None:
        raise UserError(f"{path}: holds no {name}; {SAME_MODEL}")
    if there != here:
        raise UserError(f"{path}: {name} is {list(there)} there and {list(here)} here; {SAME_MODEL}")


def fit_names(
    path: Path,
    there: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    prefix: str | None = None,
    head: str = NO_HEAD,
) -> Fit:
    """Find the model's tensors among those of a file.

    Args:
        path: the file, for messages.
        there: its tensors, on any device; a nested dict's keys are joined by dots.
        wanted: the model's.
        prefix: what stands before the model's names in the file; None: found, where only one fits.
        head: what begins the names of tensors that are left out.

    Raises:
        UserError: none fits, or several do.
    """
    plain = _unwrapped(there, wanted)
    counts = _prefixes(plain, wanted)
    needed = [name for name in wanted if name.rpartition(".")[2] != COUNTER]
    whole = [each for each in counts if all(each + name in plain for name in needed)]
    if prefix is not None:
        chosen = _chosen(path, prefix, counts, whole, wanted)
    else:
        # What lies within another one is a copy beside the weights, such as an average of them.
        outer = [each for each in whole if not any(each != more and each.startswith(more) for more in whole)]
        fits = [each for each in outer if all(there[plain[each + n]].shape == wanted[n].shape for n in needed)]
        if len(fits) > 1:
            raise UserError(
                f"resume={path}: holds {len(fits)} sets of weights that fit, under {', '.join(fits)}; "
                f"name the one to take: resume_prefix={fits[0]}"
            )
        chosen = fits[0] if fits else outer[0] if outer else _likeliest(path, there, wanted, counts)
    for name in needed:
        source = plain.get(chosen + name)
        _check_whole(path, source, there, wanted[name])
        check_shape(path, chosen + name, tuple(there[source].shape) if source else None, tuple(wanted[name].shape))
    copies = [each for each in whole if each != chosen and each.startswith(chosen)]
    beside = [name for name in plain if not name.startswith(chosen) or name.startswith(tuple(copies))]
    mine = [name.removeprefix(chosen) for name in plain if name.startswith(chosen) and name not in beside]
    more = sorted(name for name in mine if name not in wanted and not name.startswith(head))
    if more:
        raise UserError(f"{path}: holds {chosen}{more[0]}, which the model has not; {SAME_MODEL}")
    fit = Fit({name: plain[chosen + name] for name in wanted if chosen + name in plain})
    wrappers = [word for word in WRAPPERS if any(word in name for name in fit.sources.values())]
    stripped = ", ".join([*([chosen] if chosen else []), *wrappers])
    if stripped:
        fit.notes.append(f"stripped from their names: {stripped}")
    if beside:
        fit.notes.append(
            f"left out beside them: {count(len(beside), 'tensor')} ({beside[0]}{', …' * (len(beside) > 1)})"
        )
    lacking = len(wanted) - len(fit.sources)
    if lacking:
        fit.notes.append(f"{COUNTER} of {count(lacking, 'layer')} is not there, and begins at 0")
    return fit


def taken(fit: Fit, there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fit, under the model's names."""
    return {
        name: there[fit.sources[name]] if name in fit.sources else torch.zeros((), dtype=torch.long) for name in wanted
    }


def _unwrapped(there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """{name without wrappers' words: name}; a word stays where the model itself has it."""
    words = [word for word in WRAPPERS if not any(word in name for name in wanted)]
    found = {}
    for name in there:
        plain = name
        for word in words:
            plain = plain.replace(word, "")
        found[plain] = name
    return found if len(found) == len(there) else {name: name for name in there}


def _prefixes(plain: Mapping[str, str], wanted: Mapping[str, Tensor]) -> Counter[str]:
    """What stands before one of the model's names, and how often."""
    counts: Counter[str] = Counter()
    for name in plain:
        parts = name.split(".")
        counts.update(
            ".".join([*parts[:cut], ""]) if cut else "" for cut in range(len(parts)) if ".".join(parts[cut:]) in wanted
        )
    return counts


def _chosen(path: Path, prefix: str, counts: Counter[str], whole: list[str], wanted: Mapping[str, Tensor]) -> str:
    """The prefix that resume_prefix names; raises UserError where nothing of the model is under it."""
    asked = prefix if prefix.endswith(".") else f"{prefix}."
    for word in WRAPPERS:
        if not any(word in name for name in wanted):
            asked = asked.replace(word, "")
    if asked not in counts:
        known = [each for each in whole or [each for each, _ in counts.most_common(3)] if each]
        allowed = f"allowed are {', '.join(known)}" if known else "leave it out"
        raise UserError(f"resume_prefix={prefix}: {path} has none of the model's weights under it; {allowed}")
    return asked


def _likeliest(path: Path, there: Mapping[str, Tensor], wanted: Mapping[str, Tensor], counts: Counter[str]) -> str:
    """The prefix under which most of the model's names are; raises UserError where hardly any is."""
    flat = [name for name in there if name.rpartition(".")[2] in ("flat_param", "_flat_param")]
    if flat:
        raise UserError(
            f"resume={path}: {flat[0]} is one rank's part of what FSDP has flattened; save the whole weights, with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    most, times = counts.most_common(1)[0] if counts else ("", 0)
    odd = {name: each for name, each in there.items() if not (name.startswith(most) and name[len(most) :] in wanted)}
    lacking = {name: each for name, each in wanted.items() if most + name not in there}
    same = sorted(tuple(each.shape) for each in odd.values()) == sorted(tuple(each.shape) for each in lacking.values())
    if 2 * times >= len(wanted) and not (same and lacking):
        return most
    theirs, mine = next(iter(odd)), next(iter(lacking))
    raise UserError(
        f"resume={path}: its tensors have other names than the model's: {theirs} and the like, where the model has {mine}; "
        + ("their shapes are the same, so rename them and save them again" if same else SAME_MODEL)
    )


def _check_whole(path: Path, source: str | None, there: Mapping[str, Tensor], wanted: Tensor) -> None:
    """Refuse a tensor that ZeRO-3 has left empty, for its parts are in other files; raises UserError."""
    if source and there[source].numel() == 0 and wanted.numel():
        raise UserError(
            f"resume={path}: {source} is empty: DeepSpeed's stage 3 keeps each rank's part in a file of its own; put them "
            "together with the zero_to_fp32.py beside it, and name the file that it writes"
        )
