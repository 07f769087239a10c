from mbtrain.tracking.shipper import main

main()
