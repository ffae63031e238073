"""Loss terms and the kernels behind them. Start at terms.py."""
