#include "check.h"
void test_blas(){}
