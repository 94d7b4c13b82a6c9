"""METEOR and SPICE through pycocoevalcap's jar files, where Java and the package are installed (optional).

Both are slow to start: METEOR loads a 62 MB table. SPICE needs models that pycocoevalcap downloads itself; it is left
out where they are missing.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.metrics.ptb import tokenize
from vlgpt.errors import UserError


def java_scores(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """METEOR, and SPICE where it can run, as fractions. Raises UserError without Java or pycocoevalcap."""
    if shutil.which("java") is None:
        raise UserError(
            "METEOR needs Java (a JRE of version 8 or later); leave --option java_metrics out without it"
        )
    try:
        meteor = importlib.import_module("pycocoevalcap.meteor.meteor")
    except ImportError as error:
        raise UserError(
            "METEOR needs `pip install pycocoevalcap`; or leave --option java_metrics out"
        ) from error
    ids = list(references)
    given = dict(zip(ids, ([text] for text in tokenize([captions[id] for id in ids]))))
    flat = iter(tokenize([text for id in ids for text in references[id]]))
    wanted = {id: [next(flat) for _ in references[id]] for id in ids}
    found = {"METEOR": float(meteor.Meteor().compute_score(wanted, given)[0])}
    spice = importlib.import_module("pycocoevalcap.spice.spice")
    if list((Path(spice.__file__ or "").parent / "lib").glob("stanford-corenlp-*.jar")):
        found["SPICE"] = float(spice.Spice().compute_score(wanted, given)[0])
    return found
