"""ResLoRA on the UNet of a diffusers pipeline (Stable Diffusion 1.5, 2), and a file for `load_lora_weights`.

python examples/text_to_image.py --data lambdalabs/naruto-blip-captions --steps 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_reslora import ResLoRAConfig, export_lora
from peft_reslora.export import save_for_pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--data", default="lambdalabs/naruto-blip-captions", help="with `image` and `text`")
    parser.add_argument("--output", default="text-to-image")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(options.model).to(device)
    vae, text_encoder = pipeline.vae.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    config = ResLoRAConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"], shortcut="block")
    unet = get_peft_model(pipeline.unet, config)
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=1e-4)

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [row["image"].convert("RGB").resize((options.size, options.size)) for row in rows]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        tokens = pipeline.tokenizer(
            [row["text"] for row in rows], padding="max_length", truncation=True, return_tensors="pt"
        )
        return pixels.to(device), tokens.input_ids.to(device)

    batches = DataLoader(load_dataset(options.data, split="train"), options.batch, shuffle=True, collate_fn=collate)
    step = 0
    while step < options.steps:
        for pixels, tokens in batches:
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            times = torch.randint(noise_schedule.config.num_train_timesteps, (len(latents),), device=device)
            noisy = noise_schedule.add_noise(latents, noise, times)
            predicted = unet(noisy, times, encoder_hidden_states=text_encoder(tokens)[0]).sample
            wanted = noise
            if noise_schedule.config.prediction_type == "v_prediction":
                wanted = noise_schedule.get_velocity(latents, noise, times)
            loss = F.mse_loss(predicted, wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0 or step == options.steps:
                print(f"step {step}: loss {loss.item():.4f}")
            if step == options.steps:
                break
    unet.save_pretrained(options.output)
    save_for_pipeline(f"{options.output}/lora", {"unet": export_lora(unet)})  # for pipeline.load_lora_weights


if __name__ == "__main__":
    main()
