"""Device code for Mixture-of-Experts models: one folder per operation. Imports nothing of moe_serve."""
