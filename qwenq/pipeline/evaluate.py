"""Drift of a checkpoint against a reference, both streamed layer by layer, so that neither has to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qwenq.checkpoint.reader import Checkpoint, row_slices
from qwenq.errors import CheckpointError, HonestNo
from qwenq.escaping import shown
from qwenq.machine import keep_freed_memory
from qwenq.model.architectures import one_network
from qwenq.model.layer import Network, model_config
from qwenq.model.metadata import ROPE_NEUTRAL
from qwenq.pipeline.activations import HiddenStates, LayerRunner, TokenSets, embed_tokens
from qwenq.pipeline.monitor import memory_errors
from qwenq.pipeline.ranks import ALONE, Ranks
from qwenq.pipeline.reference_logits import LogitsFile, SavedLogits
from qwenq.pipeline.shares import Share
from qwenq.pipeline.workers import Workers
from qwenq.results import DriftReport
from qwenq.solver.metrics import LogitComparison, Reading, TokenDrift, summarise
from qwenq.text.tokens import ModelTokenizer, TokenWindows, check_windows
from qwenq.units import counted


@torch.inference_mode()
def evaluate(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    evaluation: TokenWindows,
    *,
    compute_dtype: torch.dtype = torch.float32,
    devices: Sequence[str] = ("cpu",),
    listen: Callable[[int], None] = lambda layer: None,
    saved: SavedLogits | None = None,
    ranks: Ranks = ALONE,
    scratch: Path = Path(),
) -> DriftReport:
    """Run both checkpoints over the evaluation windows; `listen` is told each finished layer.

    ranks: that do it together, each with the same arguments but for devices and scratch.
    scratch: a directory that keeps hidden states beyond SPILL_BYTES meanwhile; the current one by default.
    saved: the reference's logits are written on the way. llama-perplexity begins each window with the BOS token of a
    tokenizer that adds one; then so do the windows here.
    """
    check_comparable(checkpoint, reference)
    if saved is not None:
        evaluation = begun_with_bos(evaluation, ModelTokenizer(reference.directory))
        if ranks.first:
            saved.prepare(reference.spec.vocab_size, evaluation.ids)
    keep_freed_memory()
    vocab = min(checkpoint.spec.vocab_size, reference.spec.vocab_size)
    check_windows(evaluation.ids, vocab, reference.spec.extended_context, evaluation.text)

    def workers(of: Checkpoint, dtype: torch.dtype) -> Workers:
        length = evaluation.ids.shape[1]
        return Workers(of.config, of.spec, dtype=dtype, window_tokens=length, devices=devices, ranks=ranks)

    by_name = {
        "reference": workers(reference, compute_dtype),
        "float32": workers(reference, torch.float32),
        "quantized": workers(checkpoint, compute_dtype),
    }
    with memory_errors("evaluating", torch.device(devices[0]), None, "make room, or fewer windows (-n)"):
        share = ranks.share(range(len(evaluation.ids)))
        tokens = TokenSets(evaluation.ids, compute_dtype, share)
        states = embed_tokens(reference, tokens, scratch, written=checkpoint)
        checkpoint = replace(checkpoint, device=devices[0])
        runner = LayerRunner(states.states, states.shares, by_name)
        for layer in range(reference.spec.num_hidden_layers):
            runner.replay(layer, reference.finite_layer_state, checkpoint.finite_layer_state)
            reference.refuse_changed()
            checkpoint.refuse_changed()
            listen(layer)
        heads = HeadWeights(reference), HeadWeights(checkpoint)
        drift = measure_drift(by_name["reference"].first, *heads, states, evaluation, ranks, saved)
        reference.refuse_changed()
        checkpoint.refuse_changed()
        return drift


def begun_with_bos(windows: TokenWindows, tokenizer: ModelTokenizer) -> TokenWindows:
    """The windows with the token that the tokenizer begins a text with in place of each first one; as they are without.

    llama.cpp asks its file for `add_bos_token`, which its converter takes from the same tokenizer.
    """
    (around,) = tokenizer.encode([""], special=True)
    if not around or around[0] == tokenizer.eos:
        return windows
    ids = windows.ids.clone()
    ids[:, 0] = around[0]
    return replace(windows, ids=ids)


def check_comparable(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Raise CheckpointError unless both are the same architecture and read the same token ids.

    A vocabulary padded further (151,936 against 152,064) is no difference.
    """
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    for field in ("model_type", *same):
        ours, theirs = getattr(checkpoint.spec, field), getattr(reference.spec, field)
        if ours != theirs and (field in same or not one_network(ours, theirs)):
            raise CheckpointError(
                f"{checkpoint.directory} and {reference.directory} differ in {field}: {ours} and {theirs}",
                hint="the reference is the 16-bit checkpoint that the other was made from",
            )
    ours, theirs = (_constants(each) for each in (checkpoint, reference))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{checkpoint.directory} and {reference.directory} differ in {shown(name, 40)}: "
                f"{shown(repr(ours.get(name)), 40)} and {shown(repr(theirs.get(name)), 40)}"
            )
    tokenizers = [ModelTokenizer(c.directory) for c in (checkpoint, reference)]
    if tokenizers[0].sha256 != tokenizers[1].sha256 and tokenizers[0].vocabulary != tokenizers[1].vocabulary:
        raise CheckpointError(
            f"{checkpoint.directory} and {reference.directory} have different tokenizers",
            hint="drift can only be measured between models that read the same tokens",
        )


def split_otherwise(checkpoint: Checkpoint, reference: Checkpoint, evaluation: TokenWindows) -> str:
    """A line where the checkpoint's tokenizer makes other tokens of the text than the reference's, whose tokens both
    models are given here; empty where it makes the same, or where there is no text but token ids alone.
    """
    ours, theirs = (ModelTokenizer(each.directory) for each in (checkpoint, reference))
    if ours.sha256 == theirs.sha256 or evaluation.provenance.get("kind") == "token ids":
        return ""
    texts = ["".join(theirs.stream(ids)) for ids in evaluation.ids.tolist()]
    others = sum(a != b for a, b in zip(ours.encode(texts), theirs.encode(texts), strict=True))
    if not others:
        return ""
    return (
        f"{checkpoint.directory}: its tokenizer splits the text otherwise than the reference's ({others} of "
        f"{counted(len(texts), 'window')}); the figures are for the reference's tokens, in use it may lose more"
    )


def _constants(checkpoint: Checkpoint) -> dict[str, Any]:
    """`rms_norm_eps` and rotary parameters as transformers reads them: configs spell them in several ways, or leave
    them out. Those that change nothing are left out here.
    """
    read = model_config(checkpoint.config, checkpoint.spec)
    rope = {"rope_type": None, **read.rope_parameters, "type": None}  # the last is an older name of the first
    changing = {name: value for name, value in rope.items() if value not in (None, ROPE_NEUTRAL.get(name))}
    return {"rms_norm_eps": read.rms_norm_eps} | changing


def check_limits(drift: DriftReport, max_kl: float | None, max_increase_percent: float | None) -> None:
    """Raise HonestNo when the drift is over a limit, or is not a number."""
    if drift.non_finite:
        raise HonestNo(f"{drift.non_finite} of {drift.tokens} logit rows are not finite")
    if max_kl is not None and not drift.kl.mean <= max_kl:
        raise HonestNo(f"mean KL is {drift.kl.mean:.4f}, the limit {max_kl:g}")
    increase = drift.perplexity_increase_percent.mean
    if max_increase_percent is not None and not increase <= max_increase_percent:
        raise HonestNo(f"perplexity rose by {increase:.2f} %, the limit is {max_increase_percent:g} %")


@dataclass(frozen=True)
class HeadWeights:
    """A final norm and head; `convert` is what the writer does to a stored tensor, by name."""

    checkpoint: Checkpoint
    convert: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor

    @cached_property
    def norm(self) -> torch.Tensor:
        """The norm's weight [hidden], read once."""
        name = self.checkpoint.spec.norm_tensor
        return self.convert(name, self.checkpoint.refuse_blank(name, self.checkpoint.read(name)))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Head rows start to stop, float32 [rows, hidden]; those of padding may be zeros, the first ones not."""
        name = self.checkpoint.spec.head_tensor
        rows = self.checkpoint.read_slice(name, start, stop)
        if start == 0:
            self.checkpoint.refuse_blank(name, rows)
        return self.convert(name, rows).float()


def measure_drift(
    network: Network,
    reference: HeadWeights,
    quantized: HeadWeights,
    hidden: HiddenStates,
    evaluation: TokenWindows,
    ranks: Ranks = ALONE,
    saved: SavedLogits | None = None,
) -> DriftReport:
    """Divergence of hidden states `quantized` from `reference`; noise floor from `float32` where there are any.

    ranks: whose windows they are, each rank's its own; all come to the same report. saved: prepared; the first rank
    writes the reference's logits too.
    """
    floor, states = 0.0, hidden.states
    if "float32" in states:
        few = states["float32"].shape[0]
        pair = (reference, states["float32"]), (reference, states["reference"][:few])
        floor = float(compare_heads(network, *pair, evaluation.ids, hidden.shares["float32"], ranks).kl.mean())
    dtype = str(network.dtype).removeprefix("torch.")
    windows, length = evaluation.ids.shape
    reading = Reading(evaluation.text, evaluation.sha256, windows, length, dtype, floor)
    pair = (reference, states["reference"]), (quantized, states["quantized"])
    share = hidden.shares["reference"]
    found = compare_heads(network, *pair, evaluation.ids, share, ranks)
    if saved is not None:
        _save_logits(saved, found, network, pair[0], evaluation.ids, share, ranks)
    return summarise(found, reading)


def _save_logits(
    saved: SavedLogits,
    found: TokenDrift,
    network: Network,
    reference: tuple[HeadWeights, torch.Tensor],
    ids_NT: torch.Tensor,
    share: Share,
    ranks: Ranks,
) -> None:
    windows, length = ids_NT.shape
    positions = LogitsFile(reference[0].checkpoint.spec.vocab_size, windows, length).saved
    saved.kl = float(found.kl.view(windows, length - 1)[:, positions].mean())
    weights, h_NTH = reference
    own = [_predicting(network, weights, h_1TH)[:, positions] for h_1TH in h_NTH[:, None]]
    nothing_NPH = h_NTH.new_empty(0, positions.stop - positions.start, h_NTH.shape[2], dtype=torch.float32)
    x_NPH = ranks.all_windows(torch.cat([nothing_NPH.to(network.device), *own]), share)
    if ranks.first:
        saved.file.write(saved.path, ids_NT, x_NPH.flatten(0, 1), weights.rows)


def compare_heads(
    network: Network,
    reference: tuple[HeadWeights, torch.Tensor],
    quantized: tuple[HeadWeights, torch.Tensor],
    ids_NT: torch.Tensor,
    share: Share | None = None,
    ranks: Ranks = ALONE,
) -> TokenDrift:
    """Divergence of `quantized` from `reference`, each a head and its last hidden states [windows, tokens, hidden].

    Vocabularies may differ by padding only; the common part is compared. ids_NT: of all windows. share: which of these
    the states are of, this rank's; all by default. Figures are of all, on every rank.
    """
    share = share or ranks.share(range(len(ids_NT)))
    vocab = min(reference[0].checkpoint.spec.vocab_size, quantized[0].checkpoint.spec.vocab_size)
    if int(ids_NT.max()) >= vocab:
        raise CheckpointError(f"token id {int(ids_NT.max())} is outside the common vocabulary of {vocab}")
    targets = ids_NT[share.windows][:, 1:].to(network.device)
    x_ref, x_q = (
        [_predicting(network, weights, h_1TH)[0] for h_1TH in h_NTH[:, None]]
        for weights, h_NTH in (reference, quantized)
    )
    shared = reference[0] == quantized[0]
    comparison = LogitComparison(targets.reshape(-1))
    positions = targets.shape[1]
    for start, end in row_slices(vocab):
        w_ref = reference[0].rows(start, end).to(network.device)
        w_q = w_ref if shared else quantized[0].rows(start, end).to(network.device)
        for k in range(len(targets)):  # window by window: figures do not depend on who has which
            for first in range(0, positions, _CHUNK_TOKENS):
                part = slice(first, min(first + _CHUNK_TOKENS, positions))
                place = slice(k * positions + part.start, k * positions + part.stop)
                comparison.add(place, start, x_ref[k][part] @ w_ref.T, x_q[k][part] @ w_q.T)
    own = comparison.result()
    figures = (own.reference_nll, own.nll, own.kl, own.same_top1)
    all_N4T = ranks.all_windows(torch.stack([x.view(-1, positions) for x in figures], 1), share)
    nll_ref, nll, kl, same = (x_NT.reshape(-1) for x_NT in all_N4T.unbind(1))
    return TokenDrift(nll_ref, nll, kl, same, int(kl.isnan().sum()))


_CHUNK_TOKENS = 1024


def _predicting(network: Network, weights: HeadWeights, h_1TH: torch.Tensor) -> torch.Tensor:
    """Normed states of the positions of a window that predict a following token, float32 [1, tokens - 1, hidden]."""
    return network.final_norm(h_1TH[:, :-1].to(network.device), weights.norm).float()
