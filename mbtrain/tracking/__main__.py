import sys
from pathlib import Path

from mbtrain.tracking import fetching, shipper

if sys.argv[1:2] == ["--fetch"] and len(sys.argv) == 4:
    shipper.stand_back()
    fetching.main(sys.argv[2], Path(sys.argv[3]))
else:
    shipper.main()
