"""The prepared set: moments against the VAE itself, batches that see every image, captions that say what is shown."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import concept_values, noisy_images, tiny_params, write_prepared
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save

from customdiff.errors import UserError
from customdiff.models import base
from customdiff.preparation import augmentation, prepare, prepared_set
from customdiff.preparation.examples import Example
from customdiff.preparation.latent_cache import LatentCache
from customdiff.preparation.views import Views


def test_moments_and_samples_are_those_of_the_vae(tiny_base, tmp_path):
    params = tiny_params(tiny_base, prepare={"augmentation": False, "views": 1, "center_crop": True})
    paths = noisy_images(tmp_path, 3)
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    examples = [Example(path, "a cat") for path in paths]
    prepared = prepare.prepare_instances(examples, params.prepare, vae, [0])

    crop = Image.open(paths[2]).crop((5, 0, 45, 40)).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.asarray(crop) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(prepared.mean[2:], posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prepared.std[2:], posterior.std, rtol=1e-4, atol=1e-5)

    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(4))
    drawn = posterior.sample(torch.Generator().manual_seed(4)) * vae.config.scaling_factor
    found = prepared_set.sample(prepared.mean[2:], prepared.std[2:], vae.config.scaling_factor, noise)
    torch.testing.assert_close(found, drawn, rtol=1e-4, atol=1e-5)


def test_pixels_are_stored_without_cached_latents(tiny_base, tmp_path):
    params = tiny_params(tiny_base, prepare={"cache_latents": False})
    cached = tiny_params(tiny_base)
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    examples = [Example(path, "a cat") for path in noisy_images(tmp_path, 2)]
    kept = prepare.prepare_instances(examples, params.prepare, vae, [0])
    encoded = prepare.prepare_instances(examples, cached.prepare, vae, [0])
    assert kept.mean is None
    drawn = Views(examples, params.prepare, 4, augmentation.resized_view, 4, [0])
    exact = torch.stack([torch.from_numpy(view.pixels) for view, *_ in drawn])
    torch.testing.assert_close(prepared_set.to_pixels(kept.pixels), exact, rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert kept.captions == encoded.captions


def test_saved_sets_are_loaded_unchanged(tiny_base, tmp_path):
    params = tiny_params(tiny_base, concepts={"cat": concept_values(), "dog": concept_values("<new2>", "dog")})
    first, again = (write_prepared(tmp_path / name / "prepared", params) for name in ("a", "b"))
    for path in sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        assert (first / path).read_bytes() == (again / path).read_bytes()
    assert (first / "cat/instance.safetensors").read_bytes() != (first / "dog/instance.safetensors").read_bytes()
    joined = prepared_set.join([prepared_set.load(first / name / "instance") for name in ("cat", "dog")])
    assert joined.mean.shape == (32, 4, 8, 8)
    assert joined.mask.shape == (32, 1, 8, 8)
    assert all("<new1> cat" in caption for caption in joined.captions[:16])
    assert all("<new2> dog" in caption for caption in joined.captions[16:])


def test_a_damaged_set_is_rejected(tiny_base, tmp_path):
    folder = write_prepared(tmp_path / "prepared", tiny_params(tiny_base))
    captions = folder / "cat/instance.json"
    captions.write_text(json.dumps(json.loads(captions.read_text())[:-1]))
    with pytest.raises(UserError, match=r"15 .*16"):
        prepared_set.load(folder / "cat/instance")
    for tensors in (b"", save({"mean": torch.zeros(1)})):
        (folder / "cat/instance.safetensors").write_bytes(tensors)
        with pytest.raises(UserError, match=r"cat/instance.*dvc repro"):
            prepared_set.load(folder / "cat/instance")


def test_captions_carry_the_prefix_of_their_view(tiny_base, tmp_path):
    params = tiny_params(tiny_base, prepare={"views": 30})
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    example = Example(noisy_images(tmp_path, 1)[0], "photo of a <new1> cat")
    prepared = prepare.prepare_instances([example], params.prepare, vae, [0])
    for caption, mask in zip(prepared.captions, prepared.mask, strict=True):
        prefix = caption.removesuffix("photo of a <new1> cat")
        assert prefix in ("", *augmentation.FAR, *augmentation.NEAR)
        if prefix in augmentation.FAR:
            assert mask.sum() < 0.6**2 * mask.numel()
        if prefix in augmentation.NEAR:
            assert mask.all()
    assert len(set(prepared.captions)) == 5


@pytest.mark.parametrize(("length", "batch_size"), [(7, 2), (3, 5), (4, 4)])
def test_batches_see_every_image_once_before_any_twice(length, batch_size):
    drawn = [
        index for number in range(3 * length) for index in prepared_set.batch_indices(length, batch_size, 1, number)
    ]
    for epoch in range(len(drawn) // length):
        assert Counter(drawn[epoch * length : (epoch + 1) * length]) == Counter(range(length))
    assert drawn[:length] != drawn[length : 2 * length] or length < 4


def test_a_cache_leaves_what_another_process_writes_alone(tiny_base, tmp_path):
    cache = LatentCache(tmp_path, base.load_part(tiny_params(tiny_base).base, "vae", AutoencoderKL))
    (tmp_path / ".0.safetensors.incoming").write_bytes(b"half")
    (tmp_path / "old.safetensors").write_bytes(b"of an earlier run")
    cache.prune()
    assert [path.name for path in tmp_path.iterdir()] == [".0.safetensors.incoming"]


def test_cached_moments_are_the_same_bits_and_spare_the_vae(tiny_base, tmp_path):
    """Views of the same pixels are not encoded again, whatever their captions; other pixels are."""
    params = tiny_params(tiny_base)
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    first, second = noisy_images(tmp_path / "images", 2)

    def prepared(paths, caption):
        cache = LatentCache(tmp_path / "cache", vae)
        found = prepare.prepare_instances([Example(p, caption) for p in paths], params.prepare, vae, [0], cache)
        cache.prune()
        return found, cache.encoded

    plain = prepare.prepare_instances([Example(p, "a") for p in (first, second)], params.prepare, vae, [0])
    fresh, encoded = prepared([first, second], "a")
    assert encoded == 2  # batches of 4 views
    again, encoded = prepared([first, second], "b")
    assert encoded == 0
    assert again.captions[0].endswith("b")
    for name in ("mean", "std"):
        assert torch.equal(getattr(plain, name), getattr(fresh, name))
        assert torch.equal(getattr(plain, name), getattr(again, name))
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"")
    _, encoded = prepared([first, second], "a")  # damaged files are written again
    assert encoded == 2
    _, encoded = prepared([second, first], "a")  # the views of a photo depend on its number
    assert encoded == 2
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    _, encoded = prepared([second, first], "a")
    assert encoded == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
