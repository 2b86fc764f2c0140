"""Tensor functions with no knowledge of hooks or models; one folder per operation, nothing imported here."""
