"""fastvae under other libraries' unmodified models. Nothing here is imported by fastvae itself."""
