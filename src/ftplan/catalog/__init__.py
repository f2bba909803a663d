"""The catalogues: models, GPUs and optimizers as data files, each row with source and date."""
