"""`camrt compile`: one self-contained ONNX file that gives finished maps, for engines where camrt is not installed."""
