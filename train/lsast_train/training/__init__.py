"""What every training run needs: checkpoints, loss curves, signals."""
