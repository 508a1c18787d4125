"""`benchmark --what=peer`: the same model on both sides, ratios of times that were measured, and what it says where it can't compare."""

import contextlib
import importlib.util
import json

import pytest

from vidjoint import benchmark
from vidjoint.config import base_config
from vidjoint.errors import UserError
from vidjoint.speed import against_peer

SIZES = ["variant=Ti/8", "width=24", "depth=2", "heads=3", "mlp_dim=48", "frames=2", "image_size=16", "dtype=float32"]
ARGUMENTS = ["--config=configs/timesformer_k400.py", "--what=peer", "--config.init_from=", "--config.batch_size=8"]
ARGUMENTS += [f"--config.model.{size}" for size in SIZES]


def test_times_both_sides(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="the peer is PyTorch's")
    pytest.importorskip("transformers", reason="the peer is Hugging Face's")
    monkeypatch.setattr(against_peer, "ROUNDS", 3)
    assert benchmark.main([*ARGUMENTS, f"--json={tmp_path}/peer.json"]) == 0
    figures = json.loads((tmp_path / "peer.json").read_text())["peer"]
    assert figures["params"] == figures["peer_params"] > 10_000  # the same model
    assert figures["peer"].startswith("transformers ")
    for kind in ("train", "forward"):
        assert figures[f"{kind}_s"] > 0 and figures[f"peer_{kind}_s"] > 0
    out = capsys.readouterr().out
    assert f"{figures['train_ratio']:.2f}" in out and "against TimeSformer of" in out


def test_ratios_are_of_the_same_round_and_the_first_does_not_count(monkeypatch):
    ours, peers = {"train": [99.0, 1.0, 2.0, 4.0], "forward": [0.1, 1.0, 1.0, 1.0]}, {"train": [0.1, 3.0, 4.0, 4.0], "forward": [9.0, 2.0, 1.0, 5.0]}

    @contextlib.contextmanager
    def peer(config):
        yield {"torch": "T", "transformers": "H", "parameters": 7}, lambda kind: peers[kind].pop(0)

    monkeypatch.setattr(against_peer, "ROUNDS", 3)
    monkeypatch.setattr(against_peer, "_check", lambda config: None)
    monkeypatch.setattr(against_peer, "_ours", lambda config: ({kind: lambda kind=kind: ours[kind].pop(0) for kind in ours}, 7))
    monkeypatch.setattr(against_peer, "_peer", peer)
    figures = against_peer.measure_peer(base_config())
    assert (figures["train_s"], figures["peer_train_s"], figures["train_ratio"]) == (2.0, 4.0, 2.0)  # of 3, 2 and 1
    assert (figures["forward_s"], figures["peer_forward_s"], figures["forward_ratio"]) == (1.0, 2.0, 2.0)


def test_says_what_it_needs(monkeypatch):
    config = base_config()
    config.model.update(mixer="token_shift", dtype="float32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        against_peer.measure_peer(config)
    missing, model = caught.value.lines
    assert missing.endswith("torch and transformers can't be imported: pip install 'vidjoint[parity]'") and "model.mixer=divided" in model


def test_a_peer_that_fails_is_a_line(monkeypatch):
    monkeypatch.setattr(against_peer, "_check", lambda config: None)
    monkeypatch.setattr(against_peer.sys, "executable", "false")
    config = base_config()
    config.model.update(mixer="divided", dtype="float32")
    with pytest.raises(UserError, match="PyTorch's side ended: without a word"), against_peer._peer(config):
        pass
