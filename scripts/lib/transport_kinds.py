"""What ``bench_transport.py`` measures, by the names that its table gives it."""

RAW, OURS = "raw gloo", "transport"
SIDES = (RAW, OURS)
ENGINE, NOTHING = "engine", "one process"
BYTES = tuple(1 << power for power in range(16, 25, 2))  # 64 KiB to 16 MiB
