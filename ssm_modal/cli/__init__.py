"""The `ssm-modal` program: training through LightningCLI, and generation, configs and doctor beside it."""
