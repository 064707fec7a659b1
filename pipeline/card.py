"""The model card: what the model is, for whom, on what it was trained, how it scores (Mitchell et al. 2019, Model Cards for Model Reporting).

Every figure in it is filled from the metrics, and nothing in it depends on where or when it was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Config
from pipeline.flow import Flow
from pipeline.labels import LABELS
from pipeline.report import DIGEST_SHOWN, open_template
from pipeline.store import Store

TEMPLATE = "card.md.j2"


def render_card(
    config: Config,
    store: Store,
    *,
    metrics: Mapping[str, Any],
    summaries: Sequence[Mapping[str, Any]],
    flow: Flow | None,
) -> str:
    """Write the card.

    Args:
        config: the parameters of the run.
        store: what it was trained and scored on.
        metrics: what metrics.json holds.
        summaries: each fold's summary.json.
        flow: what became of each file, or None.

    Returns:
        Markdown.
    """
    held_out, stored = metrics["held_out"], flow.found.parts[-1] if flow else None
    return open_template(TEMPLATE, escape=False).render(
        **{key: metrics[key] for key in ("slice", "study", "counting", "headers", "headers_by_slice", "balanced")},
        strata=metrics["strata"],
        held_out=held_out,
        labels=LABELS,
        is_phantom=config.source.is_phantom,
        several=len(held_out["folds"]) > 1,
        prevalence=f"{100 * held_out['prevalence']:g}",
        model=config.train.model,
        sequence=config.train.sequence.kind,
        neighbours=config.train.neighbours,
        parameters=summaries[0]["parameters"],
        trained=summaries,
        image_size=store.image_size,
        crop=config.preprocess.crop,
        windows=store.windows,
        store_digest=store.digest[:DIGEST_SHOWN],
        folds_digest=str(summaries[0]["folds_digest"])[:DIGEST_SHOWN],
        flow=flow,
        stored=stored,
        left_out=flow.found.slices - stored.slices if flow and stored else None,
    )
