# Copyright 2026 The TokenTrim for Diffusers authors. Licensed under the Apache License, Version 2.0.
"""VBench's 16 dimensions, its published aggregation, and a table of both."""

import json
from pathlib import Path
from typing import NamedTuple


class Dimension(NamedTuple):
    low: float  # this score counts as 0 in the totals
    high: float  # this score counts as 1
    weight: float
    needs: str  # downloads of vbench 0.1.5


CLIP = "CLIP ViT-B/32 (~/.cache/clip/ViT-B-32.pt)"
AESTHETIC = "CLIP ViT-L/14 (~/.cache/clip/ViT-L-14.pt), aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
RAFT = "raft_model/models/raft-things.pth"
GRIT = "grit_model/grit_b_densecap_objectdet.pth, bert-base-uncased from the Hub, and the package detectron2"
VICLIP = "ViCLIP/ViClip-InternVid-10M-FLT.pth"
# Ranges are from scripts/constant.py of https://github.com/Vchitect/VBench, downloads from vbench/utils.py and the modules
# of the dimensions.
QUALITY = {
    "subject_consistency": Dimension(0.1462, 1, 1, "DINO ViT-B/16 (torch.hub, facebookresearch/dino)"),
    "background_consistency": Dimension(0.2615, 1, 1, CLIP),
    "temporal_flickering": Dimension(0.6293, 1, 1, f"{RAFT} to filter by (scoring dynamic_degree gets it)"),
    "motion_smoothness": Dimension(0.706, 0.9975, 1, "amt_model/amt-s.pth"),
    "dynamic_degree": Dimension(0, 1, 0.5, RAFT),
    "aesthetic_quality": Dimension(0, 1, 1, AESTHETIC),
    "imaging_quality": Dimension(0, 1, 1, "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"),
}
SEMANTIC = {
    "object_class": Dimension(0, 1, 1, GRIT),
    "multiple_objects": Dimension(0, 1, 1, GRIT),
    "human_action": Dimension(0, 1, 1, "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"),
    "color": Dimension(0, 1, 1, GRIT),
    "spatial_relationship": Dimension(0, 1, 1, GRIT),
    "scene": Dimension(0, 0.8222, 1, "caption_model/tag2text_swin_14m.pth, bert-base-uncased from the Hub"),
    "appearance_style": Dimension(0.0009, 0.2855, 1, CLIP),
    "temporal_style": Dimension(0, 0.364, 1, VICLIP),
    "overall_consistency": Dimension(0, 0.364, 1, VICLIP),
}
DIMENSIONS = {**QUALITY, **SEMANTIC}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


def weighted_mean(scores: dict[str, float], dimensions: dict[str, Dimension]) -> float:
    """Mean of the scores, each scaled from [low, high] to [0, 1]."""
    shares = [each.weight * (scores[name] - each.low) / (each.high - each.low) for name, each in dimensions.items()]
    return sum(shares) / sum(each.weight for each in dimensions.values())


def totals(scores: dict[str, float]) -> dict[str, float]:
    """VBench's quality, semantic and total score; each needs all of its dimensions."""
    parts = {"quality": QUALITY, "semantic": SEMANTIC}
    found = {name: weighted_mean(scores, part) for name, part in parts.items() if part.keys() <= scores.keys()}
    if len(found) == 2:
        total = QUALITY_WEIGHT * found["quality"] + SEMANTIC_WEIGHT * found["semantic"]
        found["total"] = total / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return found


def read_scores(path: Path) -> list[dict]:
    """A record for each dimension, from a scored folder or a JSON file.

    The file is `{dimension: score}`, or VBench's own `{dimension: [score, ...]}`.
    """
    if path.is_dir():
        return [json.loads(each.read_text()) for each in sorted(path.glob("vbench/*.json"))]
    found = {name.replace(" ", "_"): value for name, value in json.loads(path.read_text()).items()}
    return [{"dimension": name, "score": each[0] if isinstance(each, list) else each} for name, each in found.items()]


def table(paths: list[Path]) -> str:
    """A Markdown table in percent, a column for each folder or file, with notes on the scores below."""
    columns, notes = {}, {}
    for path in paths:
        column, records = path.name if path.is_dir() else path.stem, read_scores(path)
        scores = {each["dimension"]: each["score"] for each in records}
        for name, value in scores.items():
            if name not in DIMENSIONS or not 0 <= value <= 1:
                raise ValueError(f"{path}: {name!r} is {value!r}; expected: a score in [0, 1] of a VBench dimension.")
        modes = sorted({each["mode"] for each in records if "mode" in each})
        partial = [each["dimension"] for each in records if each.get("videos") != each.get("of")]
        whole = {name: value for name, value in scores.items() if name not in partial and len(modes) < 2}
        columns[column] = {**scores, **totals(whole)}

        said = [
            f"{each['dimension']} covers {each['videos']} of {each['of']} videos and enters no total"
            for each in records
            if each["dimension"] in partial
        ]
        if not all(each.get("static_filter", True) for each in records if each["dimension"] == "temporal_flickering"):
            said.append("temporal_flickering has no static filter")
        if modes not in ([], ["vbench_standard"]):
            said.append(f"scored as {' and '.join(modes)}{', hence no totals' * (len(modes) > 1)}")
        if missing := [name for name in DIMENSIONS if name not in scores]:
            said.append(f"no total: {len(missing)} of {len(DIMENSIONS)} dimensions have no score")
        for note in said:
            notes.setdefault(note, []).append(column)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in (*DIMENSIONS, "quality", "semantic", "total"):
        if any(row in scores for scores in columns.values()):
            cells = [f"{100 * scores[row]:.2f}" if row in scores else "" for scores in columns.values()]
            lines.append(f"| {row.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{'; '.join(names)}: {note}." for note, names in notes.items())])
