"""One training step at the real dimensions of Stable Diffusion 1.4, with random weights: slow, and 8 GB of memory."""

import json

import pytest
import torch
from conftest import tiny_params, tiny_pipeline, tiny_text_encoder
from diffusers import UNet2DConditionModel

from customdiff.adapters import adapter
from customdiff.preparation import prepared_set
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.tracking import Tracker
from customdiff.training import trainer

KEYS_AND_VALUES = 19_169_280  # 2 x 768 x (5 x 320 + 5 x 640 + 6 x 1280): 16 layers, counted in its configuration


@pytest.mark.slow
def test_a_step_of_stable_diffusion_1_4_at_512_px(tmp_path, capsys):
    pipe = tiny_pipeline(tmp_path)
    pipe.register_modules(
        text_encoder=tiny_text_encoder(pipe.tokenizer, 768, num_hidden_layers=12, num_attention_heads=12),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    )
    assert sum(weight.numel() for weight in pipe.unet.parameters()) == 859_520_964
    pipe.to(torch.float16).save_pretrained(tmp_path / "base")
    del pipe
    params = tiny_params(tmp_path / "base", prepare={"resolution": 512}, max_steps=1, batch_size=1)
    (tmp_path / "prepared/cat").mkdir(parents=True)
    for kind, caption in (("instance", "photo of a <new1> cat"), ("class", "a cat")):
        prepared = PreparedSet(
            mask=torch.ones(1, 1, 64, 64, dtype=torch.bool),
            framing=torch.tensor([[512, 512, 0, 0]], dtype=torch.int32),
            captions=[caption],
            mean=torch.randn(1, 4, 64, 64),
            std=torch.ones(1, 4, 64, 64),
        )
        prepared_set.save(prepared, tmp_path / "prepared/cat" / kind)
    run = trainer.run(params, tmp_path / "prepared", tmp_path / "runs", lambda run_id: Tracker())
    summary = json.loads((run.path / "metrics.json").read_text())
    weights = adapter.read(run.path / "adapter").weights
    assert len(weights) == 32
    assert sum(weight.numel() for weight in weights.values()) == KEYS_AND_VALUES
    assert summary["final_loss"] > 0
    with capsys.disabled():
        print(f"\npeak {summary['peak_memory_mb']:.0f} MB, {summary['seconds']:.0f} s: batch 1 + 1, fp32")
