"""Small networks on real digits: low-rank layers trained by clients that share no label."""
