"""A job of the run: what it works on, what must come of it, and what is to happen to it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqq_core.convert import quantize_checkpoint
from hqq_core.outputs import output_folders
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import sha256_file
from tests.acceptance.chaos.draws import AT_STEP, KINDS, POINTS, STEPS, Draw, HubTrouble, Strike
from tests.checkpoints import save_llama
from tests.fakehub.faults import Armed
from tests.fakehub.server import FakeHub

ONE = {"format": "compressed-tensors", "nbits": 4, "group_size": 64}
OTHER = {"format": "mlx", "nbits": 4, "group_size": 64}
THEIRS = {"theirs.txt": b"theirs"}
EARLIER = {
    "old.safetensors": b"\0" * 100,
    "halfquad_manifest.json": b'{"files": [{"name": "old.safetensors"}]}',
}


@dataclass
class Subject:
    """One job, by its draw.

    Parameters
    ----------
    made : dict
        SHA-256 of the quantized weights, by name, as the library alone makes them.
    weights : tuple
        SHA-256 of the source's weight files, which no other job's source has.
    """

    draw: Draw
    recipes: list[dict[str, Any]]
    source: str
    target: str
    url: str
    weights: tuple[str, ...]
    made: dict[str, str]
    job_id: str = ""
    armed: list[tuple[HubTrouble, Armed]] = field(default_factory=list)
    strikes: list["Pending"] = field(default_factory=list)

    @property
    def trailer(self) -> str:
        return f"Halfquad-Job: {self.job_id}"

    def body(self) -> dict[str, Any]:
        """As it is submitted."""
        target: dict[str, Any] = {"repo_id": self.target}
        match self.draw.target:
            case "pull request":
                target["create_pr"] = True
            case "branch":
                target["branch"] = "4-bit"
            case "overwrite":
                target["overwrite"] = True
            case "url":
                target = {"url": self.url}
        source = {"repo_id": self.source, "keep": self.draw.keep}
        return {"source": source, "recipes": self.recipes, "target": target}

    def pattern(self, point: str) -> str:
        """The paths of this job's requests at a point."""
        names = {"source": re.escape(self.source), "target": re.escape(self.target)}
        hashes = {"weights": "|".join(self.weights), "made": "|".join(self.made.values())}
        return POINTS[point].path.format(**names, **hashes)


@dataclass
class Pending:
    """A strike that waits for its moment; `armed` holds the request that it is to happen in."""

    strike: Strike
    armed: Armed | None = None
    done: bool = False


def make_subject(draw: Draw, folder: Path, hub: FakeHub) -> Subject:
    """Its source at the Hub, its target as it is to be found, and what the library makes of it."""
    source, target = f"team-a/source-{draw.name}", f"team-b/result-{draw.name}"
    recipes = [{**recipe, "energy": draw.energy} for recipe in ([ONE, OTHER] if draw.several else [ONE])]
    checkpoint = save_llama(folder / "sources" / draw.name, layers=3, n_shards=3, seed=draw.number)
    made = _made(checkpoint, folder / "made" / draw.name, [Recipe(**recipe) for recipe in recipes])
    hub.add_repo(source, checkpoint)
    if draw.target == "overwrite":
        hub.add_repo(target)
        hub.commit(target, {**THEIRS, **EARLIER})
    elif draw.target == "pull request":
        hub.add_repo(target)
        hub.commit(target, THEIRS)
    weights = tuple(sha256_file(path) for path in sorted(checkpoint.glob("*.safetensors")))
    url = f"file://{folder}/published/{draw.name}"
    return Subject(draw, recipes, source, target, url, weights, made)


def arm(subject: Subject, hub: FakeHub) -> None:
    """Its troubles, before it is submitted: those at the Hub in force, the others waiting."""
    for trouble in subject.draw.troubles:
        if isinstance(trouble, HubTrouble):
            point = POINTS[trouble.point]
            what = KINDS[trouble.kind] or _slow(point.rate, point.method)
            armed = hub.faults.add(
                subject.pattern(trouble.point),
                method=point.method,
                nth=trouble.nth,
                count=trouble.count,
                message=f"no such token: {hub.write_token}",  # a Hub that echoes it
                **what,
            )
            subject.armed.append((trouble, armed))
        else:
            held = None
            if trouble.moment in STEPS:
                point, what = AT_STEP[trouble.moment]
                held = hub.faults.add(subject.pattern(point), method=POINTS[point].method, **what)
            subject.strikes.append(Pending(trouble, held))


def _slow(rate: float, method: str) -> dict[str, float]:
    return {"download_rate": rate} if "GET" in method else {"upload_rate": rate}


def _made(checkpoint: Path, folder: Path, recipes: list[Recipe]) -> dict[str, str]:
    made = {}
    for recipe, name in zip(recipes, output_folders(recipes), strict=True):
        output = folder / name
        quantize_checkpoint(checkpoint, output, recipe, threads=1)
        for path in sorted(output.glob("*.safetensors")):
            made[str(path.relative_to(folder))] = sha256_file(path)
    return made
