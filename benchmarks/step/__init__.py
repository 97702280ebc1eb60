"""The whole training step of an SAE, beside other libraries'."""
