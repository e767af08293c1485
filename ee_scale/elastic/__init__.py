"""A weight-sharing supernet over one frozen model: which units a subnet keeps, its low-rank factors, its losses."""
