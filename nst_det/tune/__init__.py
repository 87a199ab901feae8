"""The same search for every method: weights, levels and options, judged on images kept from training."""
