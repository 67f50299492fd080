"""What a frozen or fine-tuned encoder knows: probes, baselines, features."""
