"""ALIGN and AltCLIP, tiny and random, with tokenizers built on the spot and saved beside the weights."""

import pytest
import torch
from PIL import Image
from test_providers import words_tokenizer

import backbones


@pytest.mark.parametrize("name", ["align", "altclip"])
def test_backbones_with_a_tokenizer_of_their_own(name, tmp_path):
    import transformers as t

    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, pad_token_id=1, max_position_embeddings=80)  # fmt: skip
    if name == "align":
        image = dict(image_size=289, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, in_channels=[8],
                     out_channels=[16], kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[1],
                     depthwise_padding=[], squeeze_expansion_ratio=0.25, num_hidden_layers=1)  # fmt: skip
        model = t.AlignModel(t.AlignConfig(text_config=text, vision_config=image, projection_dim=8))
    else:
        image = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     image_size=224, patch_size=112)  # fmt: skip
        model = t.AltCLIPModel(
            t.AltCLIPConfig(text_config={**text, "project_dim": 16}, vision_config=image, projection_dim=16)
        )
    model.save_pretrained(tmp_path / "w")
    tokenizer.save_pretrained(tmp_path / "w")
    b = backbones.load(name, torch.device("cpu"), str(tmp_path / "w"))
    one = b.encode_texts(["a photo of a cat"])
    both = b.encode_texts(["a photo of a cat", "a photo of a dog dog dog dog"])
    assert both.dtype == torch.float32 and torch.allclose(one[0], both[0], atol=1e-5)  # padding changes nothing
    assert not torch.allclose(both[0], both[1])
    pixels = b.transform()(Image.new("RGB", (330, 300), (200, 10, 10)))
    assert pixels.shape == (3, b.known.size, b.known.size)
    assert b.encode_images(pixels[None]).shape == (1, one.shape[1])
