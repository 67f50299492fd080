"""The world model in use: prediction, rollout, decoding, surprise."""
