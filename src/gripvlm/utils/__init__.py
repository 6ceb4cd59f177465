"""What every room uses: files, JSON, times, progress, batches."""
