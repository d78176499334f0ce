"""Real peak memory against context: each context prefilled in chunks and decoded from, beside the estimate's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qwenq.errors import PlanError, RunError
from qwenq.planning.engines import get_engine
from qwenq.planning.memory import NOT_ALLOCATED
from qwenq.planning.offload import host_need
from qwenq.planning.profile import MeasuredRow
from qwenq.planning.terms import Share, Term, Workload
from qwenq.planning.torch_terms import torch_terms
from qwenq.planning.weights import Weights
from qwenq.runtime.generate import Session, Timing
from qwenq.runtime.load import Loaded
from qwenq.runtime.memory import forget_peaks, gpu_at, read_peaks

DECODE_TOKENS = 4
PHASES = ("prefill", "decode")


def measure(
    found: Loaded, weights: Weights, contexts: Sequence[int], listen: Callable[[str], None] = lambda line: None
) -> tuple[list[MeasuredRow], str]:
    """Rows of every context, phase and device, and why it ended early (empty when it did not).

    Contexts grow; each gets a cache of its own size. Out of memory ends the measurement, the rows so far are kept.
    """
    model, rows = found.model, list[MeasuredRow]()
    generator = torch.Generator().manual_seed(0)
    for context in sorted(contexts):
        if context <= DECODE_TOKENS:
            raise PlanError(f"context is {context} tokens, wanted more than {DECODE_TOKENS}")
        work = replace(found.work, context=context, prompt=0)
        ids = torch.randint(0, model.spec.vocab_size, (context,), generator=generator).tolist()
        session = Session(model, context, found.work.prefill_chunk, found.work.kv_dtype)
        try:
            for phase in PHASES:
                forget_peaks(model.devices)
                if phase == "prefill":
                    session.prefill(ids[:-DECODE_TOKENS], Timing())
                else:
                    for token in ids[-DECODE_TOKENS:]:
                        session.forward([token])
                rows += _rows(found, weights, work, phase)
        except RunError as error:
            return rows, f"context {context}: {error.message}"
        finally:
            session.release()
        listen(f"context {context} measured")
    return rows, ""


def _rows(found: Loaded, weights: Weights, work: Workload, phase: str) -> list[MeasuredRow]:
    peaks = read_peaks(found.model.devices, found.base_rss)
    rows = []
    for device, peak in zip(found.model.devices, peaks, strict=True):
        if device.type == "cuda":
            index = device.index or 0
            kind = peak.device.removeprefix(f"GPU {index} ")
            share = _share(found, index, weights)
            terms, _ = torch_terms(found.model.spec, weights, get_engine("qwenq"), work, share, gpu_at(index), phase)
        else:
            kind = "CPU"
            terms = host_need(found.model.spec, weights, work, phase).terms
        exact, working = _parts(terms)
        rows.append(
            MeasuredRow(
                work.context, phase, peak.device, kind, peak.allocated_bytes, peak.reserved_bytes, peak.driver_bytes,
                exact, working,
            )
        )  # fmt: skip
    return rows


def _parts(terms: Sequence[Term]) -> tuple[int, int]:
    exact = sum(t.n_bytes for t in terms if t.name in ("weights", "kv_cache"))
    counted = sum(t.n_bytes for t in terms if t.name not in NOT_ALLOCATED)
    return exact, counted - exact


def _share(found: Loaded, index: int, weights: Weights) -> Share:
    """What one GPU holds, read back from the device map."""
    places = found.model.device_map
    layers = [k for k in range(len(weights.layers)) if places[f"model.layers.{k}"] == index]
    gpus = len({place for place in places.values() if isinstance(place, int)})
    return Share(
        range(layers[0], layers[-1] + 1) if layers else range(0),
        embed=places["model.embed_tokens"] == index,
        head=places["lm_head"] == index,
        gpus=gpus,
    )
