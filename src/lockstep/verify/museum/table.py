"""The museum: bugs that others have found in their trainings, and the mutant of ours that has each.

The stories are told in our own words from the threads that `upstream` names. The code is ours.
"""

from __future__ import annotations

from lockstep.errors import UserError
from lockstep.verify.museum.bug import Bug
from lockstep.verify.museum.data_and_state import OF_DATA_AND_STATE
from lockstep.verify.museum.gradients_and_updates import OF_GRADIENTS_AND_UPDATES

BUGS = (*OF_GRADIENTS_AND_UPDATES, *OF_DATA_AND_STATE)


def find_bug(name: str) -> Bug:
    """A bug of the museum by its name.

    Raises:
        UserError: there is none; it lists all of them.
    """
    for bug in BUGS:
        if bug.name == name:
            return bug
    raise UserError(f"museum={name}: no such bug; allowed are list, {', '.join(bug.name for bug in BUGS)}")
