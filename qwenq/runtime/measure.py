"""Real peak memory against context: each context prefilled in chunks and decoded from, beside the estimate's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qwenq.errors import RunError
from qwenq.pipeline.monitor import gpu_at
from qwenq.planning.case import Case, Workload
from qwenq.planning.engines.torch import OWN
from qwenq.planning.memory import NOT_ALLOCATED, Term
from qwenq.planning.placement import host_layers_term
from qwenq.planning.profile import MeasuredRow
from qwenq.planning.rig import Gpu
from qwenq.planning.weights import Weights
from qwenq.runtime.forecast import share_of
from qwenq.runtime.generate import Session, Timing
from qwenq.runtime.load import Loaded
from qwenq.runtime.model import compute_device
from qwenq.runtime.peaks import forget_peaks, read_peaks

DECODE_TOKENS = 4
PHASES = ("prefill", "decode")


def measure(
    found: Loaded, weights: Weights, contexts: Sequence[int], listen: Callable[[str], None] = lambda line: None
) -> tuple[list[MeasuredRow], str]:
    """Rows of every context, phase and device, and why it ended early (empty when it did not).

    Contexts, of more than DECODE_TOKENS, grow; each gets a cache of its own size. Out of memory ends the measurement,
    the rows so far are kept.
    """
    model, rows = found.model, list[MeasuredRow]()
    generator = torch.Generator().manual_seed(0)
    for context in sorted(contexts):
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
    rows, case = [], Case(found.model.spec, weights, OWN, work)
    for device, peak in zip(found.model.devices, peaks, strict=True):
        if device.type == "cuda":
            index = device.index or 0
            kind = peak.device.removeprefix(f"GPU {index} ")
            share = share_of(case.spec, found.model.device_map, index)
            terms, _ = OWN.terms(case, share, gpu_at(index), phase)
            if device == compute_device("cpu", found.model.device_map):
                terms = (*terms, _host_layers(found, case, gpu_at(index)))
        else:
            kind = "CPU"
            terms = OWN.host_terms(case, phase)
        exact, working = _parts(terms)
        rows.append(
            MeasuredRow(
                work.context, phase, peak.device, kind, peak.allocated_bytes, peak.reserved_bytes, peak.driver_bytes,
                exact, working,
            )
        )  # fmt: skip
    return rows


def _host_layers(found: Loaded, case: Case, gpu: Gpu) -> Term:
    """Memory that layers in host memory and on disk need on the GPU that computes them."""
    layers = range(case.spec.num_hidden_layers)
    inside = sum(isinstance(found.model.device_map[case.spec.layer_name(k)], int) for k in layers)
    return host_layers_term(case, OWN.kept(case.weights, case.work, gpu).layer_bytes, inside)


def _parts(terms: Sequence[Term]) -> tuple[int, int]:
    exact = sum(t.n_bytes for t in terms if t.name in ("weights", "kv_cache"))
    counted = sum(t.n_bytes for t in terms if t.name not in NOT_ALLOCATED)
    return exact, counted - exact
