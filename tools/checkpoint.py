"""state.pt: what a resume reads, what it refuses, and what a save that fails says.

    state = load_checkpoint("out/state.pt", keys, args, may_differ)    # None if there is none
    restore_optimizer(optimizer, state["optimizer"], "out/state.pt")
    with explain_failed_save("out/state.pt", step): ...
"""
import contextlib
import os

import torch

from encoder import UserError
from tools.script import user_message


def has_checkpoint(folder):
    """Whether a run in this folder goes on from a checkpoint. This has all weights, so that no --init is read then."""
    return os.path.isfile(os.path.join(folder, "state.pt"))


def load_checkpoint(path, keys, args, may_differ):
    """The state at `path`, a dict with at least these keys, or None if there is none. Unless args.resume_anyway, raises
    UserError if a saved argument (in state["args"]) differs from `args` and is not in `may_differ`."""
    if not os.path.isfile(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = set(keys).difference(state)
    except Exception as e:  # torch.load raises many types
        if user_message(e):  # trouble of the machine: the file may be whole
            raise
        raise UserError(f"{path} is damaged or no checkpoint of this script ({type(e).__name__}): move it away to "
                        "start afresh") from None
    if missing:
        raise UserError(f"{path} is of an older version, or no checkpoint of this script (it lacks "
                        f"{' '.join(sorted(missing))}): move it away to start afresh")
    now = vars(args)
    changed = [f"{k} was {v}, is now {now[k]}" for k, v in state["args"].items()
               if k in now and k not in may_differ and v != now[k]]
    if changed and not args.resume_anyway:
        raise UserError(f"{path} is of another run ({'; '.join(changed)}): use another --out, or --resume_anyway")
    return state


def restore_optimizer(optimizer, state, path):
    """Load the moments of a checkpoint. Learning rate, weight decay and other settings remain those of this command."""
    ours = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as e:  # --resume_anyway with another --freeze_encoder
        raise UserError(f"{path} has the optimizer of other parameters ({e}): use another --out") from None
    for group, settings in zip(optimizer.param_groups, ours):
        group.update(settings)


@contextlib.contextmanager
def explain_failed_save(path, step):
    """A context for all that a save writes. A full disk becomes a UserError, which says that the last save is whole."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        why = e if isinstance(e, OSError) else e.__context__  # torch.save hides the OSError behind its own
        if not isinstance(why, OSError):
            raise
        raise UserError(f"step {step} could not be saved ({why}); {path}, if there is one, is of the last save and "
                        "whole: make room, and run the same command again") from None
