import sys

from mbtrain.sweep import ship

ship.main(sys.argv[1:])
