"""Training: data, the LightningModule, callbacks, and the command line on top of LightningCLI."""
