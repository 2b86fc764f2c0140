"""Published checkpoints on our own architectures: Hugging Face folders and hub ids, tensor by tensor, without their modelling code."""
